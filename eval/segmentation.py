"""Cutting the subject out of a picture by its class noun, as in the similarity scores (method, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image
from scipy import ndimage

from model.backbones.grounded_sam import Box, Detection


class GroundedSegmenter(Protocol):
    """What is used of `model.backbones.grounded_sam.GroundedSam`."""

    def detect(self, images: Sequence[Image.Image], phrases: Sequence[str]) -> list[Detection | None]: ...

    def segment(self, images: Sequence[Image.Image], boxes: Sequence[Box]) -> tuple[list[np.ndarray], list[float]]: ...


def find_subjects(
    model: GroundedSegmenter,
    pictures: Sequence[Image.Image],
    phrase: str,
    min_detection: float,
    min_piece: float,
) -> list[np.ndarray | None]:
    """Return the mask (bool [H, W]) of what `phrase` names in each picture, None where it is not found.

    Args:
        min_detection: score 0..1 below which nothing was found.
        min_piece: see `without_specks`.
    """
    found = [
        (number, detection)
        for number, detection in enumerate(model.detect(pictures, [phrase] * len(pictures)))
        if detection is not None and detection.score >= min_detection
    ]
    result: list[np.ndarray | None] = [None] * len(pictures)
    if found:
        cut, _ = model.segment([pictures[number] for number, _ in found], [detection.box for _, detection in found])
        for (number, _), mask in zip(found, cut, strict=True):
            result[number] = without_specks(mask, min_piece) if mask.any() else None
    return result


def without_specks(mask: np.ndarray, min_piece: float) -> np.ndarray:
    """Return `mask` [H, W] without pieces smaller than this fraction of the largest: one speck would widen the crop."""
    pieces, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(pieces.ravel())[1:]
    return np.isin(pieces, np.flatnonzero(sizes >= min_piece * sizes.max()) + 1)
