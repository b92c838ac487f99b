"""The cleaning rule and the quality flags of masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from pipelines.mask import quality
from pipelines.mask.worker import MaskParams

SIDE = 100


@pytest.fixture(scope="module")
def limits(section) -> quality.QualityParams:
    return section("mask", MaskParams).quality


def disc(radius: float, row: float = SIDE / 2, column: float = SIDE / 2) -> np.ndarray:
    rows, columns = np.indices((SIDE, SIDE)) + 0.5
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def test_specks_go_and_a_piece_cut_off_by_a_finger_stays(limits):
    body, handle = disc(20), disc(8, column=85)
    assert handle.sum() > limits.min_piece * body.sum()
    speck = disc(2, row=5, column=5)
    assert np.array_equal(quality.clean(body | handle | speck, limits), body | handle)


def test_pieces_that_touch_at_a_corner_are_one(limits):
    mask = disc(20)
    tail = np.zeros_like(mask)
    last = np.flatnonzero(np.diag(mask))[-1]
    for step in range(1, 4):
        tail[last + step, last + step] = True
    assert np.array_equal(quality.clean(mask | tail, limits), mask | tail)


def test_pinholes_are_filled_and_the_hole_of_a_ring_stays(limits):
    ring = disc(30) & ~disc(12)
    pinhole = np.zeros_like(ring)
    pinhole[50, 71] = True
    assert ring[pinhole].all()
    assert np.array_equal(quality.clean(ring & ~pinhole, limits), ring)


def test_speck_in_the_hole_of_a_ring_goes_and_the_hole_stays(limits):
    ring = disc(30) & ~disc(12)
    assert np.array_equal(quality.clean(ring | disc(3), limits), ring)


def test_hole_open_to_the_outside_is_no_hole(limits):
    cup = disc(30)
    cup[:50, 50] = False
    assert np.array_equal(quality.clean(cup, limits), cup)


def test_empty_and_full_masks_stay(limits):
    for value in (False, True):
        mask = np.full((7, 9), value)
        assert np.array_equal(quality.clean(mask, limits), mask)


@given(arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=24)))
@settings(deadline=None)
def test_cleaning_keeps_something_of_every_mask_and_pieces_are_whole_or_gone(mask):
    params = quality.QualityParams(
        min_area=0.01,
        max_area=0.85,
        max_border_contact=0.25,
        min_score=0.15,
        min_box_iou=0.5,
        min_piece=0.1,
        max_hole=0.005,
        max_other=1.0,
    )
    cleaned = quality.clean(mask, params)
    assert cleaned.shape == mask.shape and cleaned.dtype == bool
    assert cleaned.any() == mask.any()
    largest = mask & cleaned
    assert not mask.any() or largest.sum() >= mask.sum() / max(1, mask.size)
    assert np.array_equal(quality.clean(mask.T, params), cleaned.T)


def test_border_contact_is_the_share_of_the_outline_on_the_photos_border():
    inside, cut = disc(20), disc(30, column=0)
    assert quality.border_contact(inside) == 0
    assert 0.3 < quality.border_contact(cut) < 0.5
    assert quality.border_contact(np.ones((9, 9), dtype=bool)) == 1
    assert quality.border_contact(np.zeros((9, 9), dtype=bool)) == 0
    square = np.zeros((10, 10), dtype=bool)
    square[:4, 3:7] = True  # an outline of 12 pixels, 4 of them on the upper border
    assert quality.border_contact(square) == pytest.approx(4 / 12)
    line = np.zeros((3, 9), dtype=bool)
    line[0, 2:5] = True  # one pixel high, at the upper border only
    assert quality.border_contact(line) == 1


@pytest.mark.parametrize(
    ("area", "contact", "score", "agreement", "other", "flag"),
    [
        (0.3, 0.0, 1.0, 1.0, 0.0, "ok"),
        (0.009, 0.9, 0.0, 0.0, 1.0, "small"),
        (0.9, 0.9, 0.0, 0.0, 1.0, "large"),
        (0.3, 0.26, 0.0, 0.0, 1.0, "border"),
        (0.3, 0.0, 0.0, 0.49, 1.0, "off_box"),
        (0.3, 0.0, 0.0, 1.0, 0.81, "several"),
        (0.3, 0.0, 0.14, 1.0, 0.8, "low_score"),
        (0.01, 0.25, 0.15, 0.5, 0.8, "ok"),
        (0.85, 0.25, 0.15, 0.5, 0.8, "ok"),
    ],
)
def test_quality_is_the_first_rule_that_a_mask_breaks(area, contact, score, agreement, other, flag, limits):
    asked = limits.model_copy(update={"max_other": 0.8})
    assert quality.quality_flag(area, contact, score, agreement, other, asked) == flag
    if flag == "several":
        assert quality.quality_flag(area, contact, 1.0, agreement, 1.0, limits) == "ok"


def test_overlaps_of_masks_and_boxes():
    a, b = np.zeros((4, 6), dtype=bool), np.zeros((4, 6), dtype=bool)
    a[:2, :4], b[1:3, 2:6] = True, True
    assert quality.iou(a, b) == pytest.approx(2 / 14)
    assert quality.iou(a, a) == 1 and quality.iou(a, ~a) == 0 and quality.iou(a & ~a, b & ~b) == 0
    assert quality.box_iou((0, 0, 4, 2), (2, 1, 6, 3)) == pytest.approx(2 / 14)
    assert quality.box_iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0 and quality.box_iou((3, 3, 3, 3), (3, 3, 3, 3)) == 0


def test_agreement_is_averaged_where_both_methods_gave_a_mask():
    rows = [{"iou": 0.9}, {"iou": None}, {"iou": 0.5}, {"iou": 0.1}]
    assert quality.summary(rows) == {"photos": 4, "both": 3, "mean_iou": 0.5, "median_iou": 0.5}
    assert quality.summary([{"iou": None}]) == {"photos": 1, "both": 0, "mean_iou": None, "median_iou": None}


@given(
    arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=16)), st.floats(0, 0.5), st.floats(0, 0.3)
)
@settings(deadline=None)
def test_cleaning_follows_the_rule_written_out_plainly(mask, min_piece, max_hole):
    params = quality.QualityParams(
        min_area=0,
        max_area=1,
        max_border_contact=1,
        min_score=0,
        min_box_iou=0,
        max_other=1,
        min_piece=min_piece,
        max_hole=max_hole,
    )
    pieces, count = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = [int((pieces == n).sum()) for n in range(1, count + 1)]
    expected = np.zeros_like(mask)
    for number, area in enumerate(areas, 1):
        if area >= min_piece * max(areas):
            expected |= pieces == number
    holes, count = ndimage.label(ndimage.binary_fill_holes(expected) & ~expected)
    whole = expected.sum()
    for number in range(1, count + 1):
        if (holes == number).sum() < max_hole * whole:
            expected |= holes == number
    assert np.array_equal(quality.clean(mask, params), expected)
