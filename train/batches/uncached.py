"""Training without cached tables: each step reads and augments photos and runs the frozen encoders.

The same code and seeds as in encode recompute what it would have written, so the losses equal those of cached tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from model.backbones.clip import Clip
from model.backbones.diffusion import load_vae
from model.backbones.encoders import after_preparing
from model.backbones.features.source import FeatureSource, ImageEncoder
from model.backbones.features.towers import image_tower
from model.backbones.variant import Variant
from model.images.inputs import augmented, latents_of, shrink
from model.images.segment import place_on_white, square_crop
from pipelines import tables
from pipelines.photos.decode import DecodeError, decode_image
from pipelines.photos.roots import Roots, SourceParams
from runtime.errors import UserError
from runtime.params import Band, Section


class AugmentParams(Section):
    """The keys of section encode that define the image encoder's input from a photo; encode reads the whole section."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    augmentations: int = Field(ge=1)
    margin: float
    scale: Band
    single_photo_rotation: float
    seed: int


@dataclass(frozen=True)
class Photos:
    """Photos with usable masks, one row each in the order of the masks table, and the encoders that read them."""

    frame_ids: pa.Array
    sources: pa.Array
    paths: pa.Array
    masks: pa.Table
    """height, width, rle."""
    roots: Roots
    params: AugmentParams
    variant: Variant
    source: FeatureSource
    encoder: ImageEncoder | None
    """None if hidden states are cached."""
    vae: Any
    """None if latents are cached."""

    @classmethod
    def open(
        cls,
        data: Path,
        params: AugmentParams,
        variant: Variant,
        source: FeatureSource,
        sources: Sequence[SourceParams],
        device: torch.device | str,
        hidden: bool,
        latents: bool,
    ) -> Self:
        """Read the tables under `data` and load the encoders of what is not cached: the image encoder `source` for
        `hidden` states, the VAE for `latents`."""
        masks = tables.read(data / "mask", "masks", ["frame_id", "height", "width", "rle", "quality"])
        masks = masks.filter(pc.equal(masks["quality"], "ok")).combine_chunks()
        frames = tables.read(data / "curate", "frames", ["frame_id", "source", "path"])
        rows = pc.index_in(masks["frame_id"], value_set=frames["frame_id"].combine_chunks())
        if rows.null_count:
            missing = masks["frame_id"].filter(pc.is_null(rows))[0].as_py()
            raise UserError(f"{data / 'mask' / 'masks'}: '{missing}' is not in the frames table; run mask again")
        frames = frames.take(rows).combine_chunks()
        roots = Roots(sources)
        for name in pc.unique(frames["source"]).to_pylist():
            roots[name]  # opens it here, not in several threads at once
        encoder = source.load(device) if hidden else None
        return cls(
            frame_ids=masks["frame_id"].combine_chunks(),
            sources=frames["source"].combine_chunks(),
            paths=frames["path"].combine_chunks(),
            masks=masks.select(["height", "width", "rle"]),
            roots=roots,
            params=params,
            variant=variant,
            source=source,
            encoder=image_tower(encoder) if isinstance(encoder, Clip) else encoder,
            vae=load_vae(variant.diffusion, torch.float32, device) if latents else None,
        )

    @property
    def hidden_shape(self) -> tuple[int, int, int]:
        """K, N, d of a photo's hidden states."""
        return self.source.shape

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, h, w of a target's latent."""
        config = self.vae.config
        side = self.variant.resolution // 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, side, side

    def segment(self, row: int) -> tuple[Any, np.ndarray]:
        """The photo (RGB) and the mask (bool [H, W]) of a row; raises UserError if the photo is missing or broken."""
        root, path = self.roots[self.sources[row].as_py()], self.paths[row].as_py()
        try:
            image = decode_image(root.read(path))
        except (DecodeError, FileNotFoundError) as error:
            raise UserError(f"{root.name(path)} can no longer be read ({error}); run curate again") from None
        height, width, rle = (self.masks[name][row].as_py() for name in ("height", "width", "rle"))
        return image, tables.decode_mask(rle, height, width)

    def pixels(self, rows: np.ndarray, views: np.ndarray, single: np.ndarray) -> Tensor:
        """Augmentation `views[i]` of photo `rows[i]` as image-encoder input [n, 3, S, S]; safe in threads."""
        prepared = []
        for row, view, alone in zip(rows.tolist(), views.tolist(), single.tolist(), strict=True):
            image, mask = self.segment(row)
            view_image = augmented(
                self.frame_ids[row].as_py(),
                image,
                mask,
                view,
                single=alone,
                size=self.source.canvas(self.variant.resolution),
                seed=self.params.seed,
                margin=self.params.margin,
                scale=self.params.scale,
                rotation=self.params.single_photo_rotation,
            )
            prepared.append(cast(ImageEncoder, self.encoder).preprocess(view_image))
        return torch.stack(prepared)

    def placed(
        self, rows: np.ndarray, scales: np.ndarray, generators: Sequence[np.random.Generator], single: np.ndarray
    ) -> Tensor:
        """The subjects of photos `rows` as image-encoder input [n, 3, S, S]: longer sides are `scales` of the square,
        places from `generators`; a `single` photo is flipped and rotated, as in `augmented`. Safe in threads."""
        prepared = []
        for row, scale, generator, alone in zip(rows.tolist(), scales.tolist(), generators, single, strict=True):
            view = place_on_white(
                *self.segment(row),
                self.source.canvas(self.variant.resolution),
                generator,
                scale=(scale, scale),
                flip=bool(alone),
                rotation=self.params.single_photo_rotation if alone else 0.0,
            )
            prepared.append(cast(ImageEncoder, self.encoder).preprocess(view))
        return torch.stack(prepared)

    def targets(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Square crops to train diffusion on [n, H, W, 3] uint8, and their masks [n, h, w] uint8; safe in threads."""
        _, height, width = self.latent_shape
        crops = [square_crop(*self.segment(row), self.variant.resolution) for row in rows.tolist()]
        return np.stack([np.asarray(crop) for crop, _ in crops]), np.stack(
            [shrink(mask, height, width) for _, mask in crops]
        )

    def hidden_states(self, pixels: Tensor) -> Tensor:
        """Hidden states [n, K, N, d] of preprocessed photos, in one pass, rounded to fp16 as in the features table."""
        ready: Any = replace(after_preparing(self.encoder), batch_size=len(pixels))
        return ready.hidden_states(list(pixels), self.source.layers).half()

    def latents(self, images: Tensor) -> Tensor:
        """Latents [n, C, h, w] float32 of images [n, H, W, 3], rounded to fp16 as in the latents table."""
        return latents_of(self.vae, images.to(self.vae.device)).half().float()
