"""The filters of the curate stage: each takes a photo and returns the reason to drop it, or None.

A filter is one function here, one reason in `tables.REJECT_REASONS` and its thresholds in `params.yaml`;
docs/filters.md shows their effect on real photos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import imagehash
import numpy as np
from PIL import Image
from pydantic import Field
from scipy import ndimage

from pipelines.photos.decode import decode_grey
from pipelines.sources.base import Photo
from runtime.params import Band, Section

# A box touches a side of the photo if it is nearer than this fraction: annotators do not hit the last pixel.
_TOUCH = 0.005

# Grey values from the background at which a pixel stands out: noise of dark frames stays below, shading does not.
_VISIBLE = 16


class FilterParams(Section):
    """Thresholds; params.yaml gives the reason for each value."""

    attributes: tuple[Literal["occluded", "truncated", "group_of", "depiction", "inside"], ...]  # that rule a box out
    max_instances: int  # boxes of the subject's class in the photo
    min_subject_area: float  # of the annotated box, fraction of the photo
    max_subject_area: float
    max_cut_sides: int  # sides of the photo that the annotated box touches
    min_side: int  # px
    max_aspect: float  # longer side over shorter side
    sharpness_side: int = Field(ge=1)  # px; a longer shorter side is downscaled to it before anything is measured
    min_sharpness: float  # variance of the Laplacian of grey values 0..255
    min_contrast: float  # standard deviation of grey values 0..255
    brightness: Band  # allowed mean grey value 0..255
    duplicate_bits: int  # photos are the same image if their perceptual hashes differ in at most n of 256 bits


@dataclass(frozen=True)
class Candidate:
    """A decoded photo with the properties that the filters check.

    image: grey, full size or downscaled; its shorter side is at least `sharpness_side` if the photo's is.
    size: width and height of the photo, px.
    """

    image: Image.Image
    size: tuple[int, int]
    sharpness_side: int

    @cached_property
    def small(self) -> Image.Image:
        """The photo with a shorter side of at most `sharpness_side`; upscaling would only smooth."""
        scale = min(1.0, self.sharpness_side / min(self.size))
        size = (round(self.size[0] * scale), round(self.size[1] * scale))
        return self.image.resize(size, Image.Resampling.BILINEAR)

    @cached_property
    def grey(self) -> np.ndarray:
        """Its grey values 0..255 [h, w] float32."""
        return np.asarray(self.small, dtype=np.float32)

    @cached_property
    def sharpness(self) -> float:
        """Variance of the Laplacian: low without edges (Pech-Pacheco et al., ICPR 2000)."""
        return float(ndimage.laplace(self.grey).var())

    @cached_property
    def phash(self) -> bytes:
        """256-bit DCT perceptual hash; with 64 bits, different views of a plain object often have the same."""
        return np.packbits(imagehash.phash(self.small, hash_size=16).hash).tobytes()


def candidate(data: bytes, max_pixels: int, params: FilterParams) -> Candidate:
    """Decode as much of a photo as the filters need.

    Raises:
        DecodeError: empty, unreadable or huge.
    """
    return Candidate(*decode_grey(data, max_pixels, params.sharpness_side), params.sharpness_side)


Reason = tuple[str, str]
T = TypeVar("T")


def unwanted_attribute(photo: Photo, params: FilterParams) -> Reason | None:
    """Annotated attributes may rule a box out."""
    return next(((name, "annotated") for name in params.attributes if name in photo.attributes), None)


def several_instances(photo: Photo, params: FilterParams) -> Reason | None:
    """With several objects of a class, the class noun in the caption is ambiguous."""
    return ("several_instances", str(photo.instances)) if photo.instances > params.max_instances else None


def subject_small(photo: Photo, params: FilterParams) -> Reason | None:
    """The embedding of a tiny subject describes its upscaling."""
    area = _area(photo)
    return ("subject_small", f"{area:.4f}") if area is not None and area < params.min_subject_area else None


def subject_large(photo: Photo, params: FilterParams) -> Reason | None:
    """A box as large as the photo shows a texture or a detail, not an object."""
    area = _area(photo)
    return ("subject_large", f"{area:.4f}") if area is not None and area > params.max_subject_area else None


def subject_cut(photo: Photo, params: FilterParams) -> Reason | None:
    """A subject cut off on many sides has no shape to learn."""
    if photo.box is None:
        return None
    x0, y0, x1, y1 = photo.box
    sides = sum((x0 < _TOUCH, y0 < _TOUCH, x1 > 1 - _TOUCH, y1 > 1 - _TOUCH))
    return ("subject_cut", f"{sides} sides") if sides > params.max_cut_sides else None


def too_small(photo: Candidate, params: FilterParams) -> Reason | None:
    """Upscaled small photos teach blur."""
    side = min(photo.size)
    return ("too_small", f"{side} px") if side < params.min_side else None


def bad_aspect(photo: Candidate, params: FilterParams) -> Reason | None:
    """A square crop of a very elongated photo loses most of it."""
    ratio = max(photo.size) / min(photo.size)
    return ("bad_aspect", f"{ratio:.2f}") if ratio > params.max_aspect else None


def bad_exposure(photo: Candidate, params: FilterParams) -> Reason | None:
    """Black, white and flat frames (lens caps, fades) show no subject; a cut-out does: enough of it stands out."""
    mean, contrast = float(photo.grey.mean()), float(photo.grey.std())
    low, high = params.brightness
    if low <= mean <= high and contrast >= params.min_contrast:
        return None
    if float((np.abs(photo.grey - np.median(photo.grey)) > _VISIBLE).mean()) >= params.min_subject_area:
        return None
    return "bad_exposure", f"mean {mean:.1f}, contrast {contrast:.1f}"


def blurred(photo: Candidate, params: FilterParams) -> Reason | None:
    """Motion blur is common in frames of hand-held video."""
    return ("blurred", f"{photo.sharpness:.1f}") if photo.sharpness < params.min_sharpness else None


# In order of evaluation; the first reason counts. Filters on annotations need no pixels and save decoding.
OF_ANNOTATIONS: tuple[Callable[[Photo, FilterParams], Reason | None], ...] = (
    unwanted_attribute,
    several_instances,
    subject_small,
    subject_large,
    subject_cut,
)
OF_PIXELS: tuple[Callable[[Candidate, FilterParams], Reason | None], ...] = (
    too_small,
    bad_aspect,
    bad_exposure,
    blurred,
)


def first_reason(
    photo: T, some: Sequence[Callable[[T, FilterParams], Reason | None]], params: FilterParams
) -> Reason | None:
    """Return the first filter's reason to drop the photo, or None."""
    return next((reason for f in some if (reason := f(photo, params))), None)


def near_duplicate(phash: bytes, seen: dict[str, bytes], max_bits: int) -> str | None:
    """Return the id of a frame in `seen` whose hash differs in at most `max_bits` bits, or None."""
    number = int.from_bytes(phash)
    return next((f for f, other in seen.items() if (number ^ int.from_bytes(other)).bit_count() <= max_bits), None)


def _area(photo: Photo) -> float | None:
    if photo.box is None:
        return None
    x0, y0, x1, y1 = photo.box
    return (x1 - x0) * (y1 - y0)
