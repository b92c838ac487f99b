"""Image encoders for streams of photos: preprocessing in threads, separate from embedding on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from model.backbones.clip import load_clip
from model.backbones.features.face import load_faces, without_layers
from model.backbones.variant import Spec
from model.backbones.vision import load_dino, load_siglip

Kind = Literal["clip", "dino", "siglip", "face"]
"""clip: any open_clip folder; dino (DINO, DINOv2 or DINOv3) and siglip (SigLIP, SigLIP 2): transformers folders; face:
one with the ID vector of a face recogniser, see `model.backbones.features.face`."""


@dataclass(frozen=True)
class Encoder:
    """A frozen image encoder in two steps."""

    name: str
    """`<hub id or path>@<12 digits of the revision>`: the encoder id in tables."""
    prepare: Callable[[Image.Image], Tensor]
    """A photo to encoder input [3, h, w], on the CPU; of one size, except for SigLIP 2 NaFlex."""
    embed: Callable[[Sequence[Tensor]], Tensor]
    """Prepared photos to unit embeddings [B, d], float32 on the device; rows are independent of each other."""
    encode_text: Callable[[Sequence[str]], Tensor] | None = None
    """Captions to unit embeddings [B, d] in the same space; None for an encoder without text."""


def load_encoder(
    kind: Kind, spec: Spec, device: str | torch.device, batch_size: int, dtype: torch.dtype = torch.float32
) -> Encoder:
    """The frozen encoder of `spec`, computing in `dtype`; raises ModelError if its folder is missing or of another
    kind."""
    if kind == "clip":
        clip = load_clip(spec, device, dtype, batch_size)
        return Encoder(clip.name, clip.preprocess, after_preparing(clip).encode_image, clip.encode_text)
    if kind == "face":
        faces = load_faces(without_layers(spec), device, dtype, batch_size)
        return Encoder(faces.name, faces.preprocess, faces.embed)
    vision = (load_dino if kind == "dino" else load_siglip)(spec, device, dtype, batch_size)
    return Encoder(vision.name, vision.preprocess, after_preparing(vision).encode_image)


def after_preparing(encoder: Any) -> Any:
    """An encoder with a `preprocess`, for images that this has already processed."""
    return replace(encoder, preprocess=as_is)


def as_is(pixels: Any) -> Tensor:
    return pixels
