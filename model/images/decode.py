"""Files, images and arrays to pixels: the one reading of photos and masks, for data stages, pipeline and commands."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeVar

import numpy as np
from PIL import Image, features

from runtime.errors import ModelError, one_line
from runtime.files import LFS_POINTER

# Listed because Pillow would otherwise also try formats that run other programs (EPS). JPEG includes MPO.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")

READS_AVIF = features.check("avif")
"""Whether Pillow was built with AVIF, as its wheels are."""

if READS_AVIF:
    FORMATS = (*FORMATS, "AVIF")

READS_HEIF = find_spec("pillow_heif") is not None
"""Whether the package pillow-heif is installed (extra `heic`), with which HEIC photos are read too."""

if READS_HEIF:
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS = (*FORMATS, "HEIF")

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
SIDEWAYS = tuple(turn for orientation, turn in _UPRIGHT.items() if orientation >= 5)
"""The transposes that exchange width and height."""

# A mask of integers has two values, blurred by compression or smoothing, if this share of them is near either end; if
# the ends are closer together than the span, it is noise.
_EXTREME, _SPAN = 0.95, 16

T = TypeVar("T")


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


def opened(data: bytes, convert: Callable[[Image.Image], T], max_pixels: int | None = None) -> T:
    """Return what `convert` makes of the opened image file; its pixels are not decoded yet.

    `max_pixels` is checked against the size in the header, before any pixel is decoded; None keeps Pillow's own limit.

    Raises:
        DecodeError: empty, unreadable or huge.
    """
    if not data:
        raise DecodeError("empty", "0 bytes")
    if data.startswith(LFS_POINTER):
        raise DecodeError("unreadable", "a git-lfs pointer, not the file itself; run git lfs pull in its folder")
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


def rgb(image: Image.Image) -> Image.Image:
    """Return a photo as RGB: upright by its EXIF orientation, transparency on white, 16 and 32 bits scaled to 8."""
    image = upright(image)
    if not image.has_transparency_data:
        return (Image.fromarray(_eight_bits(image)) if _is_deep(image) else image).convert("RGB")
    colour = _rgba(image)
    return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")


def grey(image: Image.Image) -> Image.Image:
    """Return a photo in grey (mode L), otherwise as `rgb` does."""
    image = upright(image)
    return image if image.mode == "L" and not image.has_transparency_data else rgb(image).convert("L")


def mask(given: Image.Image | np.ndarray) -> np.ndarray:
    """Return the mask that an image or array shows, bool [H, W], True on the subject.

    The mask of an image with transparent pixels is its alpha channel, of any other its brightest channel. One with two
    values is True where it has the higher of them, also if compression or smoothing put some integers between, and one
    with a single value where that is not 0; any other is cut at half of its range: 0..1, 0..255 or 0..65535. Images are
    made upright. Arrays are [H, W], or [H, W, C] with the channels of an image (L, LA, RGB or RGBA).

    Raises:
        ModelError: the array has another shape, or values that are not numbers or are in none of these ranges.
    """
    if isinstance(given, Image.Image):
        image = upright(given)
        alpha = _alpha(image)
        if alpha is not None:
            return _subject(alpha)
        plain = image.mode in ("L", "F") or _is_deep(image)
        return _subject(np.asarray(image) if plain else np.asarray(image.convert("RGB")).max(axis=-1))
    values = np.asarray(given)
    if values.ndim == 3 and values.shape[0] == 1 and values.shape[2] > 4:  # [1, H, W], as segmenters return it
        values = values[0]
    if values.ndim == 3 and values.shape[2] in (1, 2, 3, 4):
        colours = values.shape[2] - (values.shape[2] % 2 == 0)
        hides = values.shape[2] > colours and values[..., -1].size and values[..., -1].min() < _half(values[..., -1])
        values = values[..., -1] if hides else values[..., :colours].max(axis=-1)
    if values.ndim != 2:
        raise ModelError(f"the mask is an array of shape {values.shape}; give [height, width]")
    return _subject(values)


def transparency_mask(photo: Image.Image) -> np.ndarray | None:
    """Return the subject of a photo that is cut out by its transparency, bool [H, W] of the upright photo; None if it
    hides nothing."""
    alpha = _alpha(upright(photo))
    return None if alpha is None else _subject(alpha)


def upright(image: Image.Image) -> Image.Image:
    """Return the pixels of an image, turned by its EXIF orientation, which the result no longer has."""
    turn = turn_of(image)
    image = _loaded(image)
    if turn is None:
        return image
    turned = image.transpose(turn)
    for name in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
        turned.info.pop(name, None)
    return turned


def _loaded(image: Image.Image) -> Image.Image:
    """Return an image with its pixels decoded.

    Pillow 12 takes the pixels of an uncompressed YCbCr TIFF, three bytes each, for the four that libtiff would give.
    """
    tiles = getattr(image, "tile", [])
    if image.format == "TIFF" and any(tile.codec_name == "raw" and tile.args[0] == "RGBX" for tile in tiles):
        image.tile = [tile._replace(args=("RGB", *tile.args[1:])) for tile in tiles]  # type: ignore[attr-defined]
        image.load()
        return Image.merge("YCbCr", image.split())
    image.load()
    return image


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return the transpose that makes an image upright; None if it is."""
    try:
        return _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata does not make the pixels unusable
        return None


def _subject(values: np.ndarray) -> np.ndarray:
    """Return where values [H, W] belong to the subject, bool [H, W]."""
    if values.dtype == bool or not values.size:
        return values.astype(bool)
    if not (np.issubdtype(values.dtype, np.number) and np.isrealobj(values) and np.isfinite(values).all()):
        raise ModelError("the mask has values that are not numbers; give 0 for background and 1 for the subject")
    low, high = values.min(), values.max()
    if low == high:
        return values != 0
    above = values == high
    if (above | (values == low)).all():
        return above
    if low < (-0.25 if high <= 1.25 else 0) or high > 65535:
        raise ModelError(f"the mask has values from {low:g} to {high:g}; give 0..1 or 0..255")
    if np.issubdtype(values.dtype, np.integer) and int(high) - int(low) >= _SPAN:
        third = (int(high) - int(low)) / 3
        if ((values < low + third) | (values > high - third)).mean() >= _EXTREME:
            return values > low + 1.5 * third
    return values > _half(values)


def _half(values: np.ndarray) -> float:
    """Return half of the range that values are in: 0..1, also where resampling overshot it, 0..255 or 0..65535."""
    high = values.max(initial=0)
    return 0.5 if high <= 1.25 else 127.5 if high <= 255 else 32767.5


def _alpha(image: Image.Image) -> np.ndarray | None:
    """Return the alpha [H, W] uint8 of an image; None if it hides nothing, as in a mask saved by an editor."""
    if not image.has_transparency_data:
        return None
    alpha = np.asarray(_rgba(image))[..., 3]
    return alpha if (alpha < 128).any() else None


def _rgba(image: Image.Image) -> Image.Image:
    """Return an image with transparency as RGBA."""
    if not _is_deep(image):
        return image.convert("RGBA")
    colour = Image.fromarray(_eight_bits(image)).convert("RGBA")
    hidden = np.asarray(image) == image.info["transparency"]  # the one grey value that a PNG declares transparent
    colour.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    return colour


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Return a grey image of 16 or 32 bits as uint8 [H, W].

    Integers that fit in 8 bits are an 8-bit image in a larger file, others that fit in 16 bits a 16-bit one. Floats are
    in the first of 0..1, 0..255 and 0..65535 that holds them all.
    """
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0)
        return (values * (127.5 / _half(values))).clip(0, 255).round().astype(np.uint8)
    whole = np.asarray(image).astype(np.int64).clip(0)
    top = whole.max(initial=0)
    return (whole >> (0 if top <= 255 else 8 if top <= 65535 else 23)).astype(np.uint8)
