"""CLIP (Radford et al. 2021) and its kin through open_clip: image encoder of methods, similarity encoder, scorer.

A model whose image tower is timm's, such as PE-Core (Bolya et al. 2025), is read like the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors import safe_open
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from model.backbones.frozen import fixed_batches, freeze, normalised, require_layers
from model.backbones.hub import identify, reading, resolve
from model.backbones.variant import Spec
from runtime.errors import ModelError

WEIGHTS = "open_clip_model.safetensors"


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP; every result is float32 on the model's device."""

    model: open_clip.CLIP
    preprocess: Callable[[Image.Image], Tensor]
    """The checkpoint's own resize, crop and normalisation: a photo to [3, s, s]."""
    tokenize: Callable[[list[str]], Tensor]
    """Captions to token ids [B, context]."""
    width: int
    """Of embeddings."""
    batch_size: int
    name: str
    """`<hub id or path>@<12 digits of the revision>`: the encoder id in tables."""
    revision: str

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit image embeddings [B, d]."""
        rows = [
            F.normalize(self.model.encode_image(self.pixels(batch)).float(), dim=-1)[:count]
            for batch, count in fixed_batches(images, self.batch_size)
        ]
        return torch.cat(rows) if rows else self.zeros(0, self.width)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Unit caption embeddings [B, d] in the space of `encode_image`; captions are truncated to the context."""
        rows = [
            F.normalize(self.model.encode_text(self.tokenize(batch).to(self.device)).float(), dim=-1)[:count]
            for batch, count in fixed_batches(captions, self.batch_size)
        ]
        return torch.cat(rows) if rows else self.zeros(0, self.width)

    @torch.no_grad()
    def hidden_states(self, images: Sequence[Image.Image], layers: Sequence[int]) -> Tensor:
        """Output of the transformer blocks `layers` (0-based, ascending) [B, K, N, d]: the CLS token, then the patches.
        (PE-Core G has no CLS token.)

        Without a norm after the block, so block L - 2 of L is what IP-Adapter-plus (Ye et al. 2023) calls
        `hidden_states[-2]`. Raises ModelError for layers the encoder lacks, or an encoder that is not a plain ViT.
        """
        sizes = transformer_sizes(self.model.visual, self.name)
        require_layers(layers, sizes.blocks, self.name)
        rows = [self.blocks(batch, layers)[:count] for batch, count in fixed_batches(images, self.batch_size)]
        return torch.cat(rows) if rows else self.zeros(0, len(layers), sizes.first + sizes.patches, sizes.width)

    def blocks(self, images: list[Image.Image], layers: Sequence[int]) -> Tensor:
        out = self.model.visual.forward_intermediates(
            self.pixels(images),
            indices=list(layers),
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        pairs = zip(out["image_intermediates_prefix"], out["image_intermediates"], strict=True)
        return torch.stack([torch.cat(pair, dim=1) for pair in pairs], dim=1).float()

    @torch.no_grad()
    def patch_states(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        """Patch tokens after the transformer blocks `blocks` (0-based, ascending) [B, K, N, d], without a final norm.

        images: [B, 3, s, s] in 0..1, of the side that the encoder reads.
        """
        settings = PreprocessCfg(**self.model.visual.preprocess_cfg)
        out = self.model.visual.forward_intermediates(
            normalised(images, settings.mean, settings.std).to(self.device, self.dtype),
            indices=list(blocks),
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
        )
        return torch.stack(out["image_intermediates"], dim=1).float()

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """A model-ready batch [B, 3, s, s]."""
        return torch.stack([self.preprocess(image) for image in images]).to(self.device, self.dtype)

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        visual = self.model.visual
        return visual.proj.dtype if hasattr(visual, "proj") else self.model.logit_scale.dtype

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device)


def load_clip(spec: Spec, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 32) -> Clip:
    """The frozen CLIP of `spec`, computing in `dtype`.

    The folder is as written by `open_clip.push_to_hf_hub`: `open_clip_config.json` (model and preprocessing),
    `open_clip_model.safetensors`, and tokenizer files if `text_cfg.hf_tokenizer_name` is set. Raises ModelError if
    it is missing, incomplete or of another model.
    """
    folder = resolve(spec, ["open_clip_config.json", WEIGHTS, "*.json", "merges.txt", "vocab.txt"])
    what = f"an open_clip folder with open_clip_config.json and {WEIGHTS}"
    with reading(spec.path, what):
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"{WEIGHTS} is missing")
        model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        require_positions(model.state_dict(), folder / WEIGHTS)
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        width = int(config["model_cfg"]["embed_dim"])
        tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
        preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    name, revision = identify(spec, [folder / WEIGHTS])
    name = f"{name}@{revision[:12]}"
    return Clip(freeze(model.to(dtype), device), preprocess, tokenize, width, batch_size, name, revision)


@dataclass(frozen=True)
class TransformerSizes:
    """Sizes of an image tower that gives hidden states."""

    blocks: int
    first: int
    """Tokens that precede the patches."""
    patches: int
    patch: int
    """Side of one, pixels."""
    width: int


def transformer_sizes(visual: nn.Module, name: str) -> TransformerSizes:
    """Sizes of an image tower of open_clip, or of the timm model in one.

    Raises ModelError with the encoder's `name` if it is no vision transformer.
    """
    tower = visual.trunk if isinstance(visual, TimmModel) else visual
    if isinstance(tower, VisionTransformer):
        count, width = tower.positional_embedding.shape
        return TransformerSizes(len(tower.transformer.resblocks), 1, count - 1, tower.patch_size[0], width)
    if isinstance(tower, (Eva, TimmTransformer)):
        patch, first = tower.patch_embed, tower.num_prefix_tokens
        return TransformerSizes(len(tower.blocks), first, patch.num_patches, patch.patch_size[0], tower.embed_dim)
    raise ModelError(f"{name}: hidden states need a VisionTransformer, but this is a {type(tower).__name__}")


def require_positions(wanted: Mapping[str, Tensor], file: Path) -> None:
    """Raise ValueError if `file` has another number of positions than its model, which open_clip would interpolate."""
    with safe_open(file, framework="pt") as stored:
        for key in wanted.keys() & set(stored.keys()):
            shape = stored.get_slice(key).get_shape()
            if key.endswith("positional_embedding") and shape != list(wanted[key].shape):
                raise ValueError(f"'{key}' is {shape}, but open_clip_config.json gives {list(wanted[key].shape)}")
