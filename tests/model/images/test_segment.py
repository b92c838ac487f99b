"""Photo and mask -> encoder input and diffusion target."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.images.segment import box_on_white, mask_box, on_white, place_on_white, square_crop
from runtime.errors import ModelError
from tests.world.subject import RED, photo


def subject_pixels(image: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(image, dtype=int) - RED).max(axis=-1) < 40


def test_subject_alone_on_white_with_its_margin():
    out = on_white(*photo(), margin=0.1)
    assert out.size == (24, 24) and out.mode == "RGB"
    red = subject_pixels(out)
    assert mask_box(red) == (2, 7, 22, 17) and red.sum() == 200
    assert (np.asarray(out)[~red] == 255).all()


def test_box_is_the_middle_of_a_square_of_the_photo_that_is_white_where_the_photo_ends():
    pixels = np.arange(10 * 20, dtype=np.uint8).reshape(10, 20)
    image = Image.fromarray(pixels)
    inside = np.asarray(box_on_white(image, (8, 2, 12, 6), margin=0.25))
    assert inside.shape == (6, 6, 3) and (inside == pixels[1:7, 7:13, None]).all()
    wide = np.asarray(box_on_white(image, (0, 0, 20, 10), margin=0.1))
    assert wide.shape == (24, 24, 3) and (wide[7:17, 2:22] == pixels[..., None]).all()
    wide = wide.copy()
    wide[7:17, 2:22] = 255
    assert (wide == 255).all()
    assert box_on_white(image, (3.2, 4.1, 3.4, 4.2), 0).size == (1, 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.floats(0, 30), st.floats(0.1, 1), st.floats(0, 1))
def test_placed_subject_is_whole_inside_and_as_large_as_asked(seed, flip, rotation, low, share):
    high = low + (1 - low) * share
    image, mask = photo()
    out = place_on_white(image, mask, 64, np.random.default_rng(seed), (low, high), flip, rotation)
    again = place_on_white(image, mask, 64, np.random.default_rng(seed), (low, high), flip, rotation)
    assert out.size == (64, 64) and out.tobytes() == again.tobytes()
    found = (np.asarray(out) < 250).any(axis=-1)
    left, upper, right, lower = mask_box(found)
    assert 64 * low - 3 <= max(right - left, lower - upper) <= 64 * high + 3
    greens = (np.asarray(out, dtype=int)[..., 1] > np.asarray(out, dtype=int)[..., 0] + 20).sum()
    assert greens == 0


def test_an_augmentation_does_not_shift_the_draws_of_the_others():
    image, mask = photo(box=(5, 10, 15, 20))
    plain = place_on_white(image, mask, 64, np.random.default_rng(7))
    flipped = place_on_white(image, mask, 64, np.random.default_rng(7), flip=True)
    assert mask_box(subject_pixels(plain)) == mask_box(subject_pixels(flipped))


def test_target_square_moves_towards_the_subject_and_keeps_its_mask():
    image, mask = photo(60, 30, (45, 10, 55, 20))
    crop, small = square_crop(image, mask, 30)
    assert crop.size == (30, 30) and mask_box(small) == (15, 10, 25, 20)
    assert np.array_equal(subject_pixels(crop), small)
    crop, small = square_crop(image, None, 16)
    assert crop.size == (16, 16) and small.all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda image, mask: on_white(image, mask & False, 0.1), "no subject pixel; segment"),
        (lambda image, mask: on_white(image, mask[:-1], 0.1), "mask is 40x29 pixels, but the photo is 40x30"),
        (lambda image, mask: place_on_white(image, mask, 9, np.random.default_rng(0), (0.9, 0.5)), "not inside 0..1"),
        (lambda image, mask: square_crop(image, mask.T, 9), "mask is 30x40 pixels"),
    ],
)
def test_bad_masks_are_one_sentence(call, message):
    with pytest.raises(ModelError, match=message):
        call(*photo())
