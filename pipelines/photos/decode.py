"""Bytes to pixels: photos, grey copies and masks, decoded the same way by every stage and command."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image

from runtime.errors import one_line

# Listed because Pillow would otherwise also try formats that run other programs (EPS). JPEG includes MPO.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")

# EXIF orientation -> the transpose that undoes it (EXIF 2.3, tag 0x0112).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = tuple(turn for orientation, turn in _UPRIGHT.items() if orientation >= 5)


class DecodeError(Exception):
    """Bytes that are not a usable image.

    reason: `empty` (no bytes), `unreadable` (truncated, corrupt or not an image), `huge` (too many pixels).
    detail: the measured value or the decoder's message.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def decode_image(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """Return the photo as RGB: upright by its EXIF orientation, transparency on white, 16 bits scaled to 8.

    `max_pixels` is checked against the size in the header, before any pixel is decoded; None keeps Pillow's own limit.

    Raises:
        DecodeError: empty, unreadable or huge.
    """
    return _guarded(data, max_pixels, lambda image: _rgb(_upright(image)))


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
        upright = _upright(image)
        return _grey(upright), (height, width) if _turn(image) in _SIDEWAYS else (width, height)

    return _guarded(data, max_pixels, convert)


def decode_mask_image(data: bytes, max_pixels: int | None = None) -> np.ndarray:
    """Return a mask image as bool [H, W], True on the subject.

    The mask of an image with transparent pixels is its alpha channel, of any other its brightest channel, thresholded
    at half of the range. Files with values 0 and 1 only are used as they are.

    Raises:
        DecodeError: empty, unreadable or huge.
    """
    return _guarded(data, max_pixels, lambda image: _foreground(_upright(image)))


def _guarded(data: bytes, max_pixels: int | None, convert: Any) -> Any:
    if not data:
        raise DecodeError("empty", "0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # size is checked here; harmless oddities of old files need no warning
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if max_pixels is not None and width * height > max_pixels:
                    raise DecodeError("huge", f"{width} x {height} px, the limit is {max_pixels} pixels")
                return convert(image)
        except DecodeError:
            raise
        except Image.DecompressionBombError as error:
            raise DecodeError("huge", one_line(error)) from None
        except Image.UnidentifiedImageError:
            raise DecodeError("unreadable", "not an image of a known format") from None
        except Exception as error:  # Pillow's parsers raise all kinds of exceptions
            raise DecodeError("unreadable", one_line(error)) from None


def _upright(image: Image.Image) -> Image.Image:
    """Return the pixels of an opened file, made upright by its EXIF orientation."""
    image.load()
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata does not make the pixels unusable
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if _is_deep(image):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    return image if image.mode == "L" and not image.has_transparency_data else _rgb(image).convert("L")


def _foreground(image: Image.Image) -> np.ndarray:
    if _is_deep(image):
        values = _eight_bits(image)
    elif (alpha := _alpha(image)) is not None:
        values = alpha
    elif image.mode == "L":
        values = np.asarray(image)
    else:
        values = np.asarray(image.convert("RGB")).max(axis=-1)
    return values > (0 if values.max(initial=0) <= 1 else 127)


def _alpha(image: Image.Image) -> np.ndarray | None:
    """Return the alpha [H, W] uint8 of an image; None if it hides nothing, as in a mask saved by an editor."""
    if not image.has_transparency_data:
        return None
    alpha = np.asarray(image.convert("RGBA"))[..., 3]
    return alpha if (alpha < 128).any() else None


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Return a 16-bit grey image as uint8 [H, W]; values that fit in 8 bits are an 8-bit image in a 16-bit file."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    return (values >> 8 if values.max(initial=0) > 255 else values).astype(np.uint8)
