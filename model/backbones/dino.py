"""DINOv2 (Oquab et al. 2023) through transformers: the encoder of DINO-I."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, Dinov2Model
from transformers.image_processing_utils import BaseImageProcessor

from model.backbones.frozen import fixed_batches, freeze
from model.backbones.hub import from_pretrained, identify, reading, resolve
from model.backbones.variant import DinoSpec


@dataclass(frozen=True)
class Dino:
    """A frozen DINOv2."""

    model: Dinov2Model
    processor: BaseImageProcessor
    """The checkpoint's own resize, crop and normalisation."""
    batch_size: int
    name: str
    """`<hub id or path>@<12 digits of the revision>`: the encoder id in tables."""
    revision: str

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings [B, d], float32: the CLS token after the final norm."""
        rows = []
        for batch, count in fixed_batches(images, self.batch_size):
            # One at a time: the processor resizes photos of equal size together.
            pixels = [self.processor(images=image, return_tensors="pt")["pixel_values"] for image in batch]
            states = self.model(torch.cat(pixels).to(self.model.device, self.model.dtype)).last_hidden_state
            rows.append(F.normalize(states[:, 0].float(), dim=-1)[:count])
        return torch.cat(rows) if rows else torch.zeros(0, self.model.config.hidden_size, device=self.model.device)


def load_dino(
    spec: DinoSpec, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 32
) -> Dino:
    """The frozen DINOv2 of `spec`, computing as `dtype`; raises ModelError where its folder is missing or unfit."""
    folder = resolve(spec, ["config.json", "preprocessor_config.json", "model*.safetensors", "model*.json"])
    what = "a transformers folder of DINOv2"
    model = from_pretrained(Dinov2Model, folder, spec.path, what, dtype=dtype)
    with reading(spec.path, what):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    name, revision = identify(spec, folder.glob("*.safetensors"))
    return Dino(freeze(model, device), processor, batch_size, f"{name}@{revision[:12]}", revision)
