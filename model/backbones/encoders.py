"""Image encoders for streams of photos: preparing, which threads do, apart from embedding, which the device does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from model.backbones.clip import Clip, load_clip
from model.backbones.dino import load_dino
from model.backbones.siglip import load_siglip
from model.backbones.variant import ClipSpec, DinoSpec, Spec

Kind = Literal["clip", "dino", "siglip"]
"""clip: any open_clip folder; dino: DINOv2, siglip: SigLIP, folders of transformers."""


@dataclass(frozen=True)
class Encoder:
    """A frozen image encoder in two steps."""

    name: str
    """`<hub id or path>@<12 digits of the revision>`: the encoder id in tables."""
    prepare: Callable[[Image.Image], Tensor]
    """A photo as the encoder reads it [3, s, s]; touches no device."""
    embed: Callable[[Sequence[Tensor]], Tensor]
    """Prepared photos to unit embeddings [B, d], float32 on the device; no row depends on the others."""


def load_encoder(kind: Kind, spec: Spec, device: str | torch.device, batch_size: int) -> Encoder:
    """The frozen encoder of `spec`; raises ModelError where its folder is missing or of another kind."""
    if kind == "clip":
        clip = load_clip(ClipSpec(path=spec.path, revision=spec.revision), device, batch_size=batch_size)
        ready: Any = after_preparing(clip)
        return Encoder(clip.name, clip.preprocess, ready.encode_image)
    if kind == "dino":
        found: Any = load_dino(DinoSpec(path=spec.path, revision=spec.revision), device, batch_size=batch_size)
    else:
        found = load_siglip(spec, device, batch_size=batch_size)
    ready = replace(found, processor=as_processed)
    return Encoder(found.name, partial(processed, found.processor), ready.encode_image)


def after_preparing(clip: Clip) -> Clip:
    """`clip` for what its `preprocess` has made already."""
    return replace(clip, preprocess=as_is)


def as_is(pixels: Any) -> Tensor:
    return pixels


def processed(processor: Any, image: Image.Image) -> Tensor:
    """A photo as a transformers processor makes it, [3, s, s]."""
    pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return pixels


def as_processed(images: Tensor, return_tensors: str) -> dict[str, Tensor]:
    """The place of a processor where its work is done."""
    return {"pixel_values": images[None]}
