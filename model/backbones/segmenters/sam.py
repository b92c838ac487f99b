"""Segment Anything (Kirillov et al. 2023) as built by `segment_anything`, at any size, prompted with a box or points.

On disk: the published checkpoint of a published size (`sam_vit_h_4b8939.pth`, a state dict), or a folder with
`config.json` (the fields of `SamConfig`) and `model.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors.torch import load_file
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from model.backbones.frozen import freeze
from model.backbones.hub import identify, reading, require_weights, resolve
from model.backbones.segmenters.segmenter import (
    Box,
    EmbeddedPhoto,
    PromptPoint,
    Segmenter,
    is_ambiguous,
    require_digest,
)
from model.backbones.variant import SamSpec, first_fault
from runtime.errors import ModelError

CHECKPOINTS = {"vit_b": "sam_vit_b_01ec64.pth", "vit_l": "sam_vit_l_0b3195.pth", "vit_h": "sam_vit_h_4b8939.pth"}
CHECKPOINT_URL = "https://dl.fbaipublicfiles.com/segment_anything"

# ImageNet mean and deviation in 0..255, the same for every published SAM.
PIXEL_MEAN = [123.675, 116.28, 103.53]
PIXEL_STD = [58.395, 57.12, 57.375]


class SamConfig(BaseModel):
    """Sizes of one SAM. Defaults are the same in all published sizes (segment_anything/build_sam.py)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int
    """Side of the encoder's square input, pixels."""
    patch_size: int
    """Side of one patch, pixels; mask logits are at 4 / patch_size of the input's resolution."""
    depth: int
    """Blocks of the image encoder."""
    width: int
    """Channels of the image encoder."""
    heads: int
    """Attention heads of the image encoder; divides width."""
    window_size: int = 14
    """Side of the attention windows, patches; 0 makes every block global."""
    global_attention: tuple[int, ...] = ()
    """0-based blocks that attend globally even if window_size is set."""
    relative_position: bool = True
    """Decomposed relative position bias in the image encoder."""
    mlp_ratio: float = 4.0
    prompt_embed_dim: int = 256
    """Channels of the image embedding, the prompts and the decoder; a multiple of 8."""
    mask_in_channels: int = 16
    """Hidden channels for mask prompts; a multiple of 4."""
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    iou_head_depth: int = 3
    iou_head_dim: int = 256
    multimask_outputs: int = 3

    @model_validator(mode="after")
    def sizes_fit(self) -> Self:
        for whole, part in (("image_size", "patch_size"), ("width", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{part} {getattr(self, part)} does not divide {whole} {getattr(self, whole)}")
        # TwoWayTransformer's cross-attention halves the channels before it splits them into heads.
        if self.prompt_embed_dim % 8 or (self.prompt_embed_dim // 2) % self.decoder_heads:
            raise ValueError(
                f"prompt_embed_dim {self.prompt_embed_dim} must be a multiple of 8 and of 2 x decoder_heads"
                f" {self.decoder_heads}"
            )
        if self.mask_in_channels % 4:
            raise ValueError(f"mask_in_channels {self.mask_in_channels} is not a multiple of 4")
        return self


@dataclass(frozen=True)
class SamSegmenter(Segmenter):
    """A frozen SAM; steps and arithmetic are those of `segment_anything.SamPredictor`."""

    model: Sam

    def prepare(self, image: Image.Image) -> Tensor:
        """The photo with its longest side at the encoder's size, uint8 [3, h, w]; on the CPU, for threads."""
        height, width = self.resized(image.height, image.width)
        small = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1)

    @torch.no_grad()
    def encode(self, photos: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """An image embedding of each output of `prepare`."""
        dtype = next(self.model.image_encoder.parameters()).dtype
        pixels = torch.stack([self.model.preprocess(x.to(self.model.device).float()) for x in photos])
        return [(embedding,) for embedding in self.model.image_encoder(pixels.to(dtype)).float()]

    def decode(
        self, photo: EmbeddedPhoto, box: Box | None, points: Sequence[PromptPoint] = ()
    ) -> tuple[Tensor, Tensor]:
        """See `Segmenter.decode`."""
        (embedding,), device = photo.features, self.model.device
        scale = torch.tensor(photo.scale, device=device)
        corners = clicks = None
        if box is not None:
            corners = (torch.tensor(box, dtype=torch.float32, device=device) * scale.repeat(2))[None]
        if points:
            places = torch.tensor([[x, y] for x, y, _ in points], dtype=torch.float32, device=device) * scale
            labels = torch.tensor([int(on_subject) for *_, on_subject in points], device=device)
            clicks = (places[None], labels[None])
        sparse, dense = self.model.prompt_encoder(points=clicks, boxes=corners, masks=None)
        ambiguous = is_ambiguous(box, points)
        low, iou = self.model.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=ambiguous,
        )
        best = int(iou[0].argmax()) if ambiguous else 0
        logits = self.model.postprocess_masks(low[:, best : best + 1], photo.size, photo.full)
        return logits[0, 0] > self.model.mask_threshold, iou[0, best]

    def resized(self, height: int, width: int) -> tuple[int, int]:
        side: int = self.model.image_encoder.img_size
        return ResizeLongestSide.get_preprocess_shape(height, width, side)


PUBLISHED: Mapping[str, SamConfig] = {
    name: SamConfig(image_size=1024, patch_size=16, depth=depth, width=width, heads=heads, global_attention=blocks)
    for name, depth, width, heads, blocks in (
        ("vit_b", 12, 768, 12, (2, 5, 8, 11)),
        ("vit_l", 24, 1024, 16, (5, 11, 17, 23)),
        ("vit_h", 32, 1280, 16, (7, 15, 23, 31)),
    )
}


def build_sam(config: SamConfig | Mapping[str, Any]) -> Sam:
    """A SAM with random weights, in training mode, from the classes and arguments of `segment_anything.build_sam`.

    `config` is a `SamConfig` or the mapping read from a `config.json`; raises ModelError if it is inconsistent.
    """
    try:
        sizes = SamConfig.model_validate(config)
    except ValidationError as error:
        raise ModelError(f"SAM configuration: {first_fault(error)}") from error
    grid = sizes.image_size // sizes.patch_size
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=sizes.image_size,
            patch_size=sizes.patch_size,
            embed_dim=sizes.width,
            depth=sizes.depth,
            num_heads=sizes.heads,
            mlp_ratio=sizes.mlp_ratio,
            out_chans=sizes.prompt_embed_dim,
            qkv_bias=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=sizes.relative_position,
            window_size=sizes.window_size,
            global_attn_indexes=sizes.global_attention,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=sizes.prompt_embed_dim,
            image_embedding_size=(grid, grid),
            input_image_size=(sizes.image_size, sizes.image_size),
            mask_in_chans=sizes.mask_in_channels,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=sizes.multimask_outputs,
            transformer=TwoWayTransformer(
                depth=sizes.decoder_depth,
                embedding_dim=sizes.prompt_embed_dim,
                mlp_dim=sizes.decoder_mlp_dim,
                num_heads=sizes.decoder_heads,
            ),
            transformer_dim=sizes.prompt_embed_dim,
            iou_head_depth=sizes.iou_head_depth,
            iou_head_hidden_dim=sizes.iou_head_dim,
        ),
        pixel_mean=PIXEL_MEAN,
        pixel_std=PIXEL_STD,
    )


def load_sam(
    spec: SamSpec, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 8
) -> SamSegmenter:
    """The frozen SAM of `spec`; its image encoder runs in `dtype`, its prompt encoder and mask decoder in float32.

    Raises ModelError if files are missing, of another size, or do not have the variant's digest.
    """
    url = f"{CHECKPOINT_URL}/{CHECKPOINTS[spec.size]}" if spec.size else None
    found = resolve(spec, ["config.json", "model.safetensors"], hint=f"download {url} to {spec.path}" if url else "")
    if spec.size is None:
        config, weights = read_config(found / "config.json", spec.path), found / "model.safetensors"
    else:
        config, weights = PUBLISHED[spec.size], found
    require_digest(spec, [weights], url or "the file")
    what = f"SAM {spec.size or 'weights'}"
    with reading(spec.path, what):
        if weights.suffix == ".safetensors":
            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        model = with_weights(config, state)
    name, revision = identify(spec, [weights])
    freeze(model.float(), device).image_encoder.to(dtype)
    return SamSegmenter(model, batch_size, name, revision)


def read_config(file: Path, path: str) -> SamConfig:
    """The sizes in a SAM folder's config; ModelError names `path`."""
    with reading(path, "a SAM folder with config.json and model.safetensors"):
        tree = json.loads(file.read_text(encoding="utf-8"))
    try:
        return SamConfig.model_validate(tree)
    except ValidationError as error:
        raise ModelError(f"{path}/{file.name}: {first_fault(error)}") from error


def with_weights(config: SamConfig, state: Mapping[str, Tensor]) -> Sam:
    """The SAM of `config` with the tensors of `state` as they are, without first drawing 600 million random numbers."""
    with torch.device("meta"):
        model = build_sam(config)
    require_weights(model.state_dict(), state)
    model.load_state_dict(dict(state), strict=True, assign=True)
    # The two buffers are not part of a checkpoint, so they are still on the meta device.
    model.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(-1, 1, 1), persistent=False)
    model.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(-1, 1, 1), persistent=False)
    return model
