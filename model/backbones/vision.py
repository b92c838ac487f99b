"""Image encoders of transformers: DINO (Caron et al. 2021) and DINOv2 (Oquab et al. 2023) for DINO-I, SigLIP (Zhai et
al. 2023) and SigLIP 2 for similarity between subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, Dinov2Model, Dinov2WithRegistersModel, SiglipVisionModel, ViTModel
from transformers.image_processing_utils import BaseImageProcessor

from model.backbones.frozen import fixed_batches, freeze, normalised
from model.backbones.hub import from_pretrained, identify, model_type, reading, resolve
from model.backbones.variant import Spec
from runtime.errors import ModelError

# A pooling layer and a classifier read the class token after the norm, which is the embedding.
HEADS = ("pooler\\.", "classifier\\.")
DINO: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (ViTModel, {"add_pooling_layer": False}),
    "dinov2": (Dinov2Model, {}),
    "dinov2_with_registers": (Dinov2WithRegistersModel, {}),
}
"""By `model_type` of a folder's config.json: the class and its options; `vit` is DINO."""

SIGLIP = ("siglip", "siglip_vision_model")
"""Model types of a folder with both towers, or with the image tower alone."""
OTHER_TOWER = ("text_model\\.", "logit_scale$", "logit_bias$", "head\\.")
"""Weights of both towers' folder that are not the image tower's; `head` without `vision_use_head` is refused later."""


@dataclass(frozen=True)
class Vision:
    """A frozen image encoder; its results are float32 on the model's device."""

    model: Any
    processor: BaseImageProcessor
    """The checkpoint's own resize, crop and normalisation."""
    embedding: Literal["class_token", "pooler_output"]
    """Embedding of the whole image: the first token after the final norm, or a pooling head's output over all."""
    batch_size: int
    name: str
    """`<hub id or path>@<12 digits of the revision>`: the encoder id in tables."""
    revision: str

    def encode_image(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings [B, d]."""
        batches = fixed_batches(images, self.batch_size)
        rows = [self.embed([self.prepare(image) for image in batch])[:count] for batch, count in batches]
        return torch.cat(rows) if rows else self.embed([])

    def prepare(self, image: Image.Image) -> Tensor:
        """A photo as encoder input, [3, s, s]; runs on the CPU, so threads can do it."""
        # One at a time: the processor resizes photos of equal size as a batch.
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    @torch.no_grad()
    def embed(self, photos: Sequence[Tensor]) -> Tensor:
        """Unit embeddings [B, d] of photos preprocessed by `prepare`."""
        rows = [torch.zeros(0, self.model.config.hidden_size, device=self.model.device)]
        for batch, count in fixed_batches(photos, self.batch_size):
            found = self.model(torch.stack(batch).to(self.model.device, self.model.dtype))
            whole = found.last_hidden_state[:, 0] if self.embedding == "class_token" else found.pooler_output
            rows.append(F.normalize(whole.float(), dim=-1)[:count])
        return torch.cat(rows)

    @torch.no_grad()
    def patch_states(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        """Patch tokens after the transformer blocks `blocks` (0-based) [B, K, N, d], without a final norm.

        images: [B, 3, s, s] in 0..1, of the side that the encoder reads; DINOv2 reads any, and interpolates positions.
        """
        processor: Any = self.processor
        pixels = normalised(images, processor.image_mean, processor.image_std).to(self.device, self.model.dtype)
        states = self.model(pixels, output_hidden_states=True).hidden_states
        # The class token, and DINOv2's registers, precede the patches; SigLIP has neither.
        others = (self.embedding == "class_token") + getattr(self.model.config, "num_register_tokens", 0)
        return torch.stack([states[block + 1][:, others:] for block in blocks], dim=1).float()

    @property
    def device(self) -> torch.device:
        found: torch.device = self.model.device
        return found


def load_dino(
    spec: Spec, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 32
) -> Vision:
    """The frozen DINO or DINOv2 of `spec`, computing in `dtype`.

    The folder's config.json determines which (`facebook/dino-vits16`, `facebook/dinov2-base`). Raises ModelError if it
    is missing or invalid.
    """
    folder = fetch(spec)
    what = "a transformers folder of DINO or DINOv2"
    with reading(spec.path, what):
        if (found := model_type(folder)) not in DINO:
            raise ValueError(f"its model_type is {found}")
    kind, options = DINO[found]
    model = from_pretrained(kind, folder, spec.path, what, unread=HEADS, dtype=dtype, **options)
    return vision(model, spec, folder, what, "class_token", device, batch_size)


def load_siglip(
    spec: Spec, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 32
) -> Vision:
    """The frozen image tower of the SigLIP of `spec`, computing in `dtype`.

    The folder is a transformers checkpoint of fixed resolution (`google/siglip-so400m-patch14-384`,
    `google/siglip2-base-patch16-256`), with both towers or the image tower alone. Raises ModelError if it is missing or
    invalid.
    """
    folder = fetch(spec)
    what = "a transformers folder of SigLIP"
    model = from_pretrained(SiglipVisionModel, folder, spec.path, what, SIGLIP, OTHER_TOWER, dtype=dtype)
    if not model.use_head:
        raise ModelError(f"{spec.path}: this SigLIP has no pooling head, and so no image embedding; choose another")
    return vision(model, spec, folder, what, "pooler_output", device, batch_size)


def fetch(spec: Spec) -> Path:
    """The local folder of `spec`."""
    return resolve(spec, ["config.json", "preprocessor_config.json", "model*.safetensors", "model*.json"])


def vision(
    model: Any,
    spec: Spec,
    folder: Path,
    what: str,
    embedding: Literal["class_token", "pooler_output"],
    device: str | torch.device,
    batch_size: int,
) -> Vision:
    """A loaded model with the processor beside it."""
    with reading(spec.path, what):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    name, revision = identify(spec, folder.glob("*.safetensors"))
    return Vision(freeze(model, device), processor, embedding, batch_size, f"{name}@{revision[:12]}", revision)
