"""Photos of a subject -> VAE latents and hidden states of the image encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from model.backbones.diffusion import load_vae
from model.backbones.encoders import after_preparing
from model.backbones.features.source import FeatureParams
from model.backbones.variant import load_variant
from model.images.inputs import augmented, encode_latents, shrink
from model.images.segment import square_crop
from pipelines.engine.shards import Rows
from pipelines.photos import segments
from pipelines.photos.prefetch import prefetch
from pipelines.photos.roots import Roots, SourceParams
from runtime.params import Band, Section


class EncodeParams(Section):
    """What is cached for training, and how much of it."""

    latents: bool  # VAE latents of targets
    hidden_states: bool  # of the image encoder, of the roles in `inputs`
    inputs: tuple[Literal["reference", "positive", "target"], ...]  # roles whose hidden states are cached
    augmentations: int = Field(ge=1)  # per photo: the plain segment, and n - 1 placed at random on white
    margin: float  # white border of the plain segment, fraction of its longer side
    scale: Band  # longer side of a placed segment, fraction of the canvas
    single_photo_rotation: float  # degrees; rotations (and flips) stand in for other views of a single photo
    max_gigabytes: float  # hidden states are skipped if they would take more
    seed: int
    batch_size: int = Field(ge=1)
    shard_subjects: int = Field(ge=1)


@dataclass(frozen=True)
class Views:
    """The encoders' inputs of a photo.

    Attributes:
        crop: the square that the diffusion model learns from, and its mask; None if the photo is not a target.
        segments: the augmentations of its subject, as inputs of the image encoder; empty if it is only a target.
    """

    crop: tuple[Image.Image, np.ndarray] | None
    segments: list[torch.Tensor]


class EncodeWorker:
    """Encodes the photos of subjects; `decoders` threads prepare the next ones while the models compute."""

    def __init__(
        self,
        params: EncodeParams,
        reader: FeatureParams,
        variant: str,
        sources: Sequence[SourceParams],
        device: str,
        decoders: int = 0,
    ) -> None:
        """`reader`: the method whose image encoder gives the hidden states."""
        self.params, self.device, self.decoders, self.roots = params, device, decoders, Roots(sources)
        self.variant = load_variant(variant)
        size = params.batch_size
        self.source = reader.source(self.variant)
        self.encoder = self.source.load(device, batch_size=size) if params.hidden_states else None
        self.vae = load_vae(self.variant.diffusion, torch.float32, device) if params.latents else None

    def compute(self, payloads: Sequence[list[dict[str, Any]]]) -> list[Rows]:
        results: list[Rows] = [{"latents": [], "features": []} for _ in payloads]
        places = [rows for rows, frames in zip(results, payloads, strict=True) for _ in frames]
        frames = [frame for payload in payloads for frame in payload]
        for source in {frame["source"] for frame in frames}:
            self.roots[source]  # opened here, not concurrently by several threads
        latents, features = Backlog(self.params.batch_size), Backlog(self.params.batch_size)
        prepared = prefetch(self.prepare, frames, self.decoders, 2 * self.params.batch_size)
        for rows, frame, views in zip(places, frames, prepared, strict=True):
            if views.crop is not None:
                latents.add((rows["latents"], frame["frame_id"], *views.crop))
            for index, pixels in enumerate(views.segments):
                features.add((rows["features"], frame["frame_id"], index, pixels))
            self.encode(latents.full(), features.full())
        self.encode(latents.rest(), features.rest())
        return results

    def prepare(self, frame: dict[str, Any]) -> Views:
        """Read a photo and prepare the models' inputs; called by threads."""
        image, mask = segments.read_segment(self.roots, frame)
        roles = frame["extra"]
        pixels: list[torch.Tensor] = []
        if roles["input"] and self.encoder is not None:
            views = (self.augment(frame, image, mask, index) for index in range(self.params.augmentations))
            pixels = [self.encoder.preprocess(view) for view in views]
        is_target = roles["target"] and self.vae is not None
        return Views(square_crop(image, mask, self.variant.resolution) if is_target else None, pixels)

    def encode(self, crops: Sequence[Any], views: Sequence[Any]) -> None:
        """Add the rows of `crops` (rows, frame_id, image, mask) and `views` (rows, frame_id, index, pixels)."""
        if crops:
            latents = encode_latents(self.vae, [c[2] for c in crops], self.params.batch_size, self.device)
            for (rows, frame_id, _, mask), latent in zip(crops, latents, strict=True):
                rows.append(latent_row(frame_id, latent, mask))
        if views and self.encoder is not None:
            ready = after_preparing(self.encoder)
            hidden = ready.hidden_states([v[3] for v in views], self.source.layers).cpu().numpy()
            for (rows, frame_id, index, _), states in zip(views, hidden, strict=True):
                rows.append(feature_row(frame_id, index, states))

    def augment(self, frame: dict[str, Any], image: Image.Image, mask: np.ndarray, index: int) -> Image.Image:
        """Return augmentation `index` of a photo, always the same one."""
        return augmented(
            frame["frame_id"],
            image,
            mask,
            index,
            single=frame["extra"]["single"],
            size=self.source.canvas(self.variant.resolution),
            seed=self.params.seed,
            margin=self.params.margin,
            scale=self.params.scale,
            rotation=self.params.single_photo_rotation,
        )


def latent_row(frame_id: str, latent: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """Return a row of the latents table: `latent` [C, h, w], `mask` of the crop it was computed from."""
    channels, height, width = latent.shape
    return {
        "frame_id": frame_id,
        "latent": latent.astype(np.float16).reshape(-1),
        "channels": channels,
        "height": height,
        "width": width,
        "subject_mask": shrink(mask, height, width).reshape(-1),
    }


def feature_row(frame_id: str, augmentation: int, states: np.ndarray) -> dict[str, Any]:
    """Return a row of the features table: `states` [K, N, d]."""
    layers, tokens, width = states.shape
    return {
        "frame_id": frame_id,
        "augmentation": augmentation,
        "hidden": states.astype(np.float16).reshape(-1),
        "layers": layers,
        "tokens": tokens,
        "width": width,
    }


class Backlog:
    """Buffers items until they fill a batch."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.waiting: list[Any] = []

    def add(self, item: Any) -> None:
        self.waiting.append(item)

    def full(self) -> list[Any]:
        """Take whole batches; the remainder stays."""
        count = len(self.waiting) // self.size * self.size
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken

    def rest(self) -> list[Any]:
        """Take what is left."""
        taken, self.waiting = self.waiting, []
        return taken
