"""Bytes to pixels: photos, grey copies and masks, decoded the same way by every stage and command."""

from __future__ import annotations

import numpy as np
from PIL import Image

from model.images import decode
from model.images.decode import FORMATS, READS_AVIF, READS_HEIF, DecodeError

__all__ = ["FORMATS", "READS_AVIF", "READS_HEIF", "DecodeError", "decode_grey", "decode_image", "decode_mask_image"]


def decode_image(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """Return the photo as RGB: upright by its EXIF orientation, transparency on white, 16 and 32 bits scaled to 8.

    `max_pixels` is checked against the size in the header, before any pixel is decoded; None keeps Pillow's own limit.

    Raises:
        DecodeError: empty, unreadable or huge.
    """
    return decode.opened(data, decode.rgb, max_pixels)


def decode_grey(data: bytes, max_pixels: int | None = None, least: int = 0) -> tuple[Image.Image, tuple[int, int]]:
    """Return the photo in grey (mode L), otherwise as `decode_image` does, and the width and height of the whole photo.

    A JPEG is decoded at a half, a quarter or an eighth of its size if its shorter side keeps `least` px: the decoder
    then skips most of the work, and colour entirely. 0 keeps the size.

    Raises:
        DecodeError: empty, unreadable or huge.
    """

    def convert(image: Image.Image) -> tuple[Image.Image, tuple[int, int]]:
        width, height = image.size
        if least:
            image.draft("L", (least, least))
        pixels = decode.grey(image)
        return pixels, (height, width) if decode.turn_of(image) in decode.SIDEWAYS else (width, height)

    return decode.opened(data, convert, max_pixels)


def decode_mask_image(data: bytes, max_pixels: int | None = None) -> np.ndarray:
    """Return a mask image as bool [H, W], True on the subject, as `model.images.decode.mask` reads it.

    Raises:
        DecodeError: empty, unreadable or huge.
    """
    return decode.opened(data, decode.mask, max_pixels)
