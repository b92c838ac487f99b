"""A photo of a red subject on green, with its mask."""

from __future__ import annotations

import numpy as np
from PIL import Image

RED = (200, 10, 10)


def photo(width: int = 40, height: int = 30, box: tuple[int, int, int, int] = (5, 10, 25, 20)):
    """A red subject on green, and its mask."""
    mask = np.zeros((height, width), dtype=bool)
    left, upper, right, lower = box
    mask[upper:lower, left:right] = True
    pixels = np.where(mask[..., None], RED, (0, 120, 0)).astype(np.uint8)
    return Image.fromarray(pixels), mask
