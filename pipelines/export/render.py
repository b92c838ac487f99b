"""From a pair's photos and masks to the images that are exported."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from model.images.segment import mask_box, on_white, square_crop
from pipelines.export.options import ENCODINGS, ExportOptions
from pipelines.photos.roots import Roots
from pipelines.photos.segments import read_segment

BLACK = (0, 0, 0)


@dataclass(frozen=True)
class PairImage:
    """An image of a pair.

    Attributes:
        image: RGB, or RGBA where the subject alone is transparent; its hidden pixels are white.
        mask: of the subject, bool [H, W].
    """

    image: Image.Image
    mask: np.ndarray

    def box(self) -> list[int] | None:
        """Return x0, y0, x1, y1 of the subject, px, the last two exclusive; None if it is smaller than a pixel."""
        return list(mask_box(self.mask)) if self.mask.any() else None


def render(roots: Roots, pair: Mapping[str, Any], options: ExportOptions) -> dict[str, PairImage]:
    """Return the images of a pair of the plan by role.

    Raises:
        UserError: a photo was removed or damaged since the mask stage read it.
    """
    made = {}
    for role in options.roles():
        photo, mask = read_segment(roots, pair[role])
        if role == "target" or options.reference == "whole":
            made[role] = whole(photo, mask, options)
        else:
            made[role] = alone(photo, mask, options)
    return made


def whole(photo: Image.Image, mask: np.ndarray, options: ExportOptions) -> PairImage:
    """Return a photo with its background: the square around the subject, or all of it, never enlarged."""
    if options.crop == "square":
        return PairImage(*square_crop(photo, mask, options.size))
    scale = min(1.0, options.size / max(photo.size))
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    return PairImage(
        photo.resize(size, Image.Resampling.LANCZOS),
        np.asarray(Image.fromarray(mask).convert("L").resize(size, Image.Resampling.BILINEAR)) >= 128,
    )


def alone(photo: Image.Image, mask: np.ndarray, options: ExportOptions) -> PairImage:
    """Return the subject alone on a square, white or transparent."""
    size = (options.size, options.size)
    image = on_white(photo, mask, options.margin).resize(size, Image.Resampling.LANCZOS)
    silhouette = on_white(Image.new("RGB", photo.size, BLACK), mask, options.margin).convert("L")
    cover = silhouette.resize(size, Image.Resampling.BILINEAR).point(lambda value: 255 - value)
    if options.reference == "alpha":
        image.putalpha(cover)
    return PairImage(image, np.asarray(cover) >= 128)


def encoded(image: Image.Image, options: ExportOptions) -> tuple[str, bytes]:
    """Return the suffix and bytes of an image file; PNG if the encoding has no transparency and the image has some."""
    encoding = "png" if image.mode == "RGBA" and options.encoding == "jpeg" else options.encoding
    stream = io.BytesIO()
    image.save(stream, encoding.upper(), **({} if encoding == "png" else {"quality": options.quality}))
    return ENCODINGS[encoding], stream.getvalue()


def encoded_mask(mask: np.ndarray) -> tuple[str, bytes]:
    """Return the suffix and bytes of a mask's file: PNG, white on the subject."""
    stream = io.BytesIO()
    Image.fromarray(mask).convert("L").save(stream, "PNG")
    return ".png", stream.getvalue()
