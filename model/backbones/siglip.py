"""SigLIP (Zhai et al. 2023) and SigLIP 2 through transformers: an encoder of likeness between subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, SiglipVisionModel
from transformers.image_processing_utils import BaseImageProcessor

from model.backbones.frozen import fixed_batches, freeze
from model.backbones.hub import from_pretrained, identify, reading, resolve
from model.backbones.variant import Spec
from model.errors import ModelError


@dataclass(frozen=True)
class Siglip:
    """The frozen image half of a SigLIP."""

    model: SiglipVisionModel
    processor: BaseImageProcessor
    """The checkpoint's own resize and normalisation."""
    batch_size: int
    name: str
    """`<hub id or path>@<12 digits of the revision>`: the encoder id in tables."""
    revision: str

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings [B, d], float32: what the attention pooling head makes of the patches."""
        rows = []
        for batch, count in fixed_batches(images, self.batch_size):
            # One at a time: the processor resizes photos of equal size together.
            pixels = [self.processor(images=image, return_tensors="pt")["pixel_values"] for image in batch]
            pooled = self.model(torch.cat(pixels).to(self.model.device, self.model.dtype)).pooler_output
            rows.append(F.normalize(pooled.float(), dim=-1)[:count])
        return torch.cat(rows) if rows else torch.zeros(0, self.model.config.hidden_size, device=self.model.device)


def load_siglip(
    spec: Spec, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 32
) -> Siglip:
    """The frozen SigLIP of `spec`, computing as `dtype`.

    The folder is what transformers publishes for fixed resolutions (`google/siglip-so400m-patch14-384`,
    `google/siglip2-base-patch16-256`), of both halves or of the image half alone. Raises ModelError where it is missing
    or unfit.
    """
    folder = resolve(spec, ["config.json", "preprocessor_config.json", "model*.safetensors", "model*.json"])
    what = "a transformers folder of SigLIP"
    model = from_pretrained(SiglipVisionModel, folder, spec.path, what, dtype=dtype)
    if not model.use_head:
        raise ModelError(
            f"{spec.path}: this SigLIP has no pooling head, and so no embedding of a picture; name another"
        )
    with reading(spec.path, what):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    name, revision = identify(spec, folder.glob("*.safetensors"))
    return Siglip(freeze(model, device), processor, batch_size, f"{name}@{revision[:12]}", revision)
