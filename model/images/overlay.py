"""Images with a mask's outline or a map over them."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

OUTLINE = (255, 0, 110)
"""Visible on every background; a subject of this pink is rarer than one of any primary colour."""

COVERED = 0.65
"""Opacity of a map's colours over the image: readable, with the image still visible below."""


def outlined(image: Image.Image, mask: np.ndarray, side: int, colour: tuple[int, int, int] = OUTLINE) -> Image.Image:
    """Return `image` at `side` px, scaled up by a whole factor or scaled down, with the outline of `mask` [H, W]."""
    factor = side / max(image.size)
    if factor >= 1:
        size = (image.width * int(factor), image.height * int(factor))
        large = image.resize(size, Image.Resampling.NEAREST)
    else:
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        large = image.resize(size, Image.Resampling.LANCZOS)
    shape = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    ring = ndimage.binary_dilation(shape, iterations=1) & ~ndimage.binary_erosion(shape, iterations=1)
    halo = ndimage.binary_dilation(ring, iterations=1) & ~ring
    pixels = np.asarray(large).copy()
    pixels[halo] = 255
    pixels[ring] = colour
    return Image.fromarray(pixels)


def heated(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """Return `image` in grey overlaid with the heat map `weights` (0..1, any size): violet 0, yellow 1."""
    from matplotlib import colormaps

    grown = Image.fromarray(weights.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    colours = colormaps["viridis"](np.clip(np.asarray(grown), 0, 1))[..., :3] * 255
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None]
    return Image.fromarray(np.rint(COVERED * colours + (1 - COVERED) * grey).astype(np.uint8))
