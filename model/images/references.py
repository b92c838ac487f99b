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


def segment_photo(
    photo: Photo, noun: str, finder: Callable[[], GroundedSam], margin: float = MARGIN, name: str | None = None
) -> Image.Image:
    """The subject of a photo alone on a white square, RGB: cut out by the given mask, else by the photo's transparency,
    else by Grounded SAM, which looks for the `noun`.

    finder: returns Grounded SAM; called only if needed. name: the photo's name in messages.

    Raises ModelError if nothing is found, or the mask is empty, of another size, or no mask.
    """
    name = name or f"the photo of '{noun}'"
    image, mask = photo if isinstance(photo, tuple) else (photo, None)
    pixels = decode.rgb(image)
    try:
        found = decode.transparency_mask(image) if mask is None else decode.mask(mask)
        return on_white(pixels, find_subject(pixels, noun, finder(), name) if found is None else found, margin)
    except ModelError as error:
        raise ModelError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from None


def find_subject(photo: Image.Image, noun: str, finder: GroundedSam, name: str) -> np.ndarray:
    """Mask bool [H, W] of the `noun` in a photo; ModelError if nothing is found."""
    detection = finder.detect([photo], [noun])[0]
    if detection is None:
        raise ModelError(f"{name}: no '{noun}' was found in the photo; give a mask, or correct the class noun")
    mask = finder.segment([photo], [detection.box])[0][0]
    if not mask.any():
        raise ModelError(f"{name}: the '{noun}' found in the photo has an empty mask; give a mask")
    return mask
