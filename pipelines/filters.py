"""The filters of the curate stage: each takes a photo and returns why it is dropped, or nothing.

A filter is one function here, one reason in `tables.REJECT_REASONS` and its thresholds in `params.yaml`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import imagehash
import numpy as np
from PIL import Image
from scipy import ndimage

from params import Section


class FilterParams(Section):
    """Thresholds; each one's reason stands beside its value in params.yaml."""

    min_side: int  # px
    max_aspect: float  # longer side over shorter side
    sharpness_side: int  # px; a longer shorter side is reduced to it before sharpness is measured
    min_sharpness: float  # variance of the Laplacian of grey values 0..255
    min_contrast: float  # standard deviation of grey values 0..255
    brightness: tuple[float, float]  # allowed mean grey value 0..255
    min_subject_area: float  # of the annotated box, fraction of the photo
    duplicate_bits: int  # frames of one subject whose perceptual hashes differ in at most so many of 64 bits


@dataclass(frozen=True)
class Candidate:
    """A decoded photo with what the filters look at.

    Attributes:
        image: RGB.
        box: annotated x0, y0, x1, y1 as fractions of the sides, or None.
    """

    image: Image.Image
    box: tuple[float, float, float, float] | None
    sharpness_side: int

    @cached_property
    def grey(self) -> np.ndarray:
        """Grey values 0..255 [h, w] float32, shorter side at most `sharpness_side`; enlarging would only smooth."""
        scale = min(1.0, self.sharpness_side / min(self.image.size))
        size = (round(self.image.width * scale), round(self.image.height * scale))
        return np.asarray(self.image.convert("L").resize(size, Image.Resampling.BILINEAR), dtype=np.float32)

    @cached_property
    def sharpness(self) -> float:
        """Variance of the Laplacian: low where there are no edges (Pech-Pacheco et al., ICPR 2000)."""
        return float(ndimage.laplace(self.grey).var())

    @cached_property
    def phash(self) -> int:
        """64-bit DCT perceptual hash."""
        return int(str(imagehash.phash(self.image)), 16)


Reason = tuple[str, str]


def too_small(photo: Candidate, params: FilterParams) -> Reason | None:
    """Upscaled small photos teach blur."""
    side = min(photo.image.size)
    return ("too_small", f"{side} px") if side < params.min_side else None


def bad_aspect(photo: Candidate, params: FilterParams) -> Reason | None:
    """A square crop of a very long photo loses most of it."""
    ratio = max(photo.image.size) / min(photo.image.size)
    return ("bad_aspect", f"{ratio:.2f}") if ratio > params.max_aspect else None


def bad_exposure(photo: Candidate, params: FilterParams) -> Reason | None:
    """Black, white and flat frames (lens caps, fades) hold no subject."""
    mean, contrast = float(photo.grey.mean()), float(photo.grey.std())
    low, high = params.brightness
    if low <= mean <= high and contrast >= params.min_contrast:
        return None
    return "bad_exposure", f"mean {mean:.1f}, contrast {contrast:.1f}"


def blurred(photo: Candidate, params: FilterParams) -> Reason | None:
    """Motion blur is common in frames of hand-held video."""
    return ("blurred", f"{photo.sharpness:.1f}") if photo.sharpness < params.min_sharpness else None


def subject_small(photo: Candidate, params: FilterParams) -> Reason | None:
    """A tiny subject gives an embedding of its upscaling."""
    if photo.box is None:
        return None
    x0, y0, x1, y1 = photo.box
    area = (x1 - x0) * (y1 - y0)
    return ("subject_small", f"{area:.4f}") if area < params.min_subject_area else None


# In the order they are asked; the first reason counts.
FILTERS: tuple[Callable[[Candidate, FilterParams], Reason | None], ...] = (
    too_small,
    bad_aspect,
    bad_exposure,
    blurred,
    subject_small,
)


def first_reason(photo: Candidate, params: FilterParams) -> Reason | None:
    """Return the first reason to drop the photo, or None."""
    return next((reason for f in FILTERS if (reason := f(photo, params))), None)


def near_duplicate(phash: int, seen: dict[str, int], max_bits: int) -> str | None:
    """Return the id of a frame in `seen` whose hash differs in at most `max_bits` bits, or None."""
    return next((frame for frame, other in seen.items() if (phash ^ other).bit_count() <= max_bits), None)
