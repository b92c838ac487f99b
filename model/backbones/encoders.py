"""Image encoders for streams of photos: preparing, which threads do, apart from embedding, which the device does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from model.backbones.clip import Clip, load_clip
from model.backbones.variant import ClipSpec, Spec
from model.backbones.vision import load_dino, load_siglip

Kind = Literal["clip", "dino", "siglip"]
"""clip: any open_clip folder; dino: DINO or DINOv2, siglip: SigLIP, folders of transformers."""


@dataclass(frozen=True)
class Encoder:
    """A frozen image encoder in two steps."""

    name: str
    """`<hub id or path>@<12 digits of the revision>`: the encoder id in tables."""
    prepare: Callable[[Image.Image], Tensor]
    """A photo as the encoder reads it [3, s, s]; touches no device."""
    embed: Callable[[Sequence[Tensor]], Tensor]
    """Prepared photos to unit embeddings [B, d], float32 on the device; no row depends on the others."""
    encode_text: Callable[[Sequence[str]], Tensor] | None = None
    """Captions to unit embeddings [B, d] in the same space; None for an encoder that reads none."""


def load_encoder(
    kind: Kind, spec: Spec, device: str | torch.device, batch_size: int, dtype: torch.dtype = torch.float32
) -> Encoder:
    """The frozen encoder of `spec`, computing as `dtype`; raises ModelError where its folder is missing or of another
    kind."""
    if kind == "clip":
        clip = load_clip(ClipSpec(path=spec.path, revision=spec.revision), device, dtype, batch_size)
        ready: Any = after_preparing(clip)
        return Encoder(clip.name, clip.preprocess, ready.encode_image, clip.encode_text)
    vision = (load_dino if kind == "dino" else load_siglip)(spec, device, dtype, batch_size)
    return Encoder(vision.name, vision.prepare, vision.embed)


def after_preparing(clip: Clip) -> Clip:
    """`clip` for what its `preprocess` has made already."""
    return replace(clip, preprocess=as_is)


def as_is(pixels: Any) -> Tensor:
    return pixels
