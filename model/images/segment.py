"""From a photo and its subject's mask to the image an encoder sees and the square target of the diffusion model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from runtime.errors import ModelError

WHITE = (255, 255, 255)
Box = tuple[int, int, int, int]


def mask_box(mask: np.ndarray) -> Box:
    """Smallest box (left, upper, right, lower; the last two exclusive) around the True pixels of `mask` [H, W].

    Raises ModelError if no pixel is True.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        raise ModelError("the mask has no subject pixel; segment the photo again or drop it")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def on_white(image: Image.Image, mask: np.ndarray, margin: float) -> Image.Image:
    """The subject alone: background white, cropped to the mask's box, padded with white to a square (RGB).

    `image` RGB, `mask` bool [H, W] of the same size. `margin` is the white border on each side, as a fraction of the
    box's longer side (0 = none). Raises ModelError for an empty mask or one of another size.
    """
    cut = _cut_out(image, mask)
    border = round(margin * max(cut.size))
    side = max(cut.size) + 2 * border
    square = Image.new("RGB", (side, side), WHITE)
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2), cut)
    return square


def box_on_white(image: Image.Image, box: Sequence[float], margin: float) -> Image.Image:
    """The square part of a photo around a box (RGB), with white where the photo ends.

    `box`: x0, y0, x1, y1, pixels. `margin` is added on each side, as a fraction of the box's longer side.
    """
    left, upper, right, lower = box
    side = max(round((1 + 2 * margin) * max(right - left, lower - upper)), 1)
    x, y = (round((low + high - side) / 2) for low, high in ((left, right), (upper, lower)))
    square = Image.new("RGB", (side, side), WHITE)
    inside = (max(x, 0), max(y, 0), min(x + side, image.width), min(y + side, image.height))
    square.paste(image.convert("RGB").crop(inside), (inside[0] - x, inside[1] - y))
    return square


def place_on_white(
    image: Image.Image,
    mask: np.ndarray,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.5, 0.9),
    flip: bool = False,
    rotation: float = 0.0,
) -> Image.Image:
    """The subject alone on a white `size` x `size` square, at a random position and size (method, section 1).

    The longer side of the (rotated) subject becomes size * u, u uniform in `scale` (fractions 0..1]; the position
    is uniform among those that keep it inside. `flip` mirrors with probability 1/2, `rotation` is the largest rotation
    in degrees in either direction. All randomness comes from `rng`.
    """
    low, high = scale
    if not 0 < low <= high <= 1:
        raise ModelError(f"scale {low}..{high} is not inside 0..1; give (low, high) with 0 < low <= high <= 1")
    cut = _cut_out(image, mask)
    # Every number is drawn whether used or not, so that no argument shifts the draws after it.
    mirrored, turn, share, left, top = rng.random(5)
    if flip and mirrored < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rotation:
        cut = cut.rotate(rotation * (2 * turn - 1), resample=Image.Resampling.BICUBIC, expand=True)
        cut = cut.crop(cut.getchannel("A").getbbox())
    side = size * (low + (high - low) * share)
    factor = side / max(cut.size)
    cut = cut.resize(
        (max(1, min(size, round(cut.width * factor))), max(1, min(size, round(cut.height * factor)))),
        Image.Resampling.LANCZOS,
    )
    square = Image.new("RGB", (size, size), WHITE)
    square.paste(cut, (round(left * (size - cut.width)), round(top * (size - cut.height))), cut)
    return square


def square_crop(image: Image.Image, mask: np.ndarray | None, size: int) -> tuple[Image.Image, np.ndarray]:
    """The target: the photo's largest square, centred on the subject as far as the photo allows.

    Returns the crop resized to `size` x `size` (RGB) and its mask bool [size, size]; without a mask the square is the
    central one and every pixel counts as subject.
    """
    side = min(image.size)
    if mask is None:
        centre = (image.width / 2, image.height / 2)
    else:
        _check_size(image, mask)
        left, upper, right, lower = mask_box(mask)
        centre = ((left + right) / 2, (upper + lower) / 2)
    x, y = (int(np.clip(round(c - side / 2), 0, extent - side)) for c, extent in zip(centre, image.size, strict=True))
    box = (x, y, x + side, y + side)
    crop = image.convert("RGB").crop(box).resize((size, size), Image.Resampling.LANCZOS)
    if mask is None:
        return crop, np.ones((size, size), dtype=bool)
    small = Image.fromarray(mask).convert("L").crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return crop, np.asarray(small) >= 128


def _cut_out(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """RGBA crop of the mask's box, transparent outside the subject."""
    _check_size(image, mask)
    # White under the transparent pixels as well, so that resampling cannot bleed background into the outline.
    pixels = np.where(mask[..., None], np.asarray(image.convert("RGB")), np.uint8(255))
    rgba = np.concatenate([pixels, (mask * np.uint8(255))[..., None].astype(np.uint8)], axis=-1)
    return Image.fromarray(rgba).crop(mask_box(mask))


def _check_size(image: Image.Image, mask: np.ndarray) -> None:
    if mask.shape != (image.height, image.width):
        raise ModelError(
            f"the mask is {mask.shape[1]}x{mask.shape[0]} pixels, but the photo is {image.width}x{image.height};"
            " use the mask of this photo"
        )
