"""User photos -> the segments that the image encoder reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from model.images import decode
from model.images.segment import on_white
from runtime.errors import ModelError

if TYPE_CHECKING:
    from model.backbones.grounded_sam import GroundedSam

Photo = Image.Image | tuple[Image.Image, Image.Image | np.ndarray]
"""A photo, or a photo and its subject's mask: white or True on the subject, of the size of the upright photo. Both are
read as the data stages read files (`model.images.decode`)."""

MARGIN = 0.05
"""White border of a segment, as a fraction of its longer side, as in the adapters' training (`encode.margin`)."""

MASK_COLOURS = 256
"""An image of at most so many colours is taken for a mask, whatever they are."""
MASK_SPREAD = 0.08
"""Largest ratio of the second to the first principal deviation of a mask's colours. Masks have two colours and mixtures
of them, which is a line: up to 0.07 for JPEGs; 0.09 and more in coloured photos."""


def segment_photo(
    photo: Photo, noun: str, finder: Callable[[], GroundedSam], margin: float = MARGIN, name: str | None = None
) -> Image.Image:
    """The subject of a photo alone on a white square, RGB: cut out by the given mask, else by the photo's transparency,
    else by Grounded SAM, which looks for the `noun`.

    finder: returns Grounded SAM; called only if needed. name: the photo's name in messages.

    Raises ModelError if nothing is found, or the mask is empty, of another size, or no mask.
    """
    name = name or f"the photo of '{noun}'"
    if isinstance(photo, tuple) and is_coloured_photo(photo[1]):
        raise ModelError(f"{name}: the mask given with it is a photo in colour; give the subject white on black")
    image, mask = photo if isinstance(photo, tuple) else (photo, None)
    pixels = decode.rgb(image)
    try:
        found = decode.transparency_mask(image) if mask is None else decode.mask(mask)
        return on_white(pixels, find_subject(pixels, noun, finder(), name) if found is None else found, margin)
    except ModelError as error:
        raise ModelError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from None


def find_subject(photo: Image.Image, noun: str, finder: GroundedSam, name: str) -> np.ndarray:
    """Mask bool [H, W] of the `noun` in a photo; ModelError if nothing is found."""
    _, cut = finder.cut_one(photo, noun)
    if cut is None:
        raise ModelError(f"{name}: no '{noun}' was found in the photo; give a mask, or correct the class noun")
    if not cut.mask.any():
        raise ModelError(f"{name}: the '{noun}' found in the photo has an empty mask; give a mask")
    return cut.mask


def is_coloured_photo(mask: Image.Image | np.ndarray) -> bool:
    """Whether an image given as a mask has the colours of a photo; False for grey ones, and for masks in alpha."""
    if isinstance(mask, np.ndarray):
        if mask.dtype != np.uint8 or mask.ndim != 3 or mask.shape[2] != 3:
            return False
        mask = Image.fromarray(mask)
    if mask.mode == "RGBA" and np.asarray(mask)[..., 3].min() < 255:
        return False
    if mask.mode not in ("RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV", "LAB"):
        return False
    colours = mask.convert("RGB")
    if colours.getcolors(MASK_COLOURS) is not None:
        return False
    variances = np.linalg.eigvalsh(np.cov(np.asarray(colours).reshape(-1, 3).T))
    return bool(variances[1] > MASK_SPREAD**2 * variances[2])
