"""Each filter on a photo made to break it, and on one that passes."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from pipelines import tables
from pipelines.curate import filters
from pipelines.curate.filters import Candidate
from pipelines.curate.worker import CurateParams
from pipelines.sources.base import ATTRIBUTES, Photo
from tests.world.photos import blocks, encoded


@pytest.fixture(scope="module")
def limits(section) -> filters.FilterParams:
    return section("curate", CurateParams).filters


def candidate(image: Image.Image, side: int = 256) -> Candidate:
    return Candidate(image.convert("L"), image.size, side)


def boxed(*box: float, attributes=(), instances: int = 1) -> Photo:
    return Photo("s/0", "0.jpg", box=box, attributes=attributes, instances=instances)


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (120, 90), (value, value, value))


BROKEN: dict[str, tuple[Callable, Callable[[], Candidate]]] = {
    "too small": (filters.too_small, lambda: candidate(blocks(width=180, height=63))),
    "too long": (filters.bad_aspect, lambda: candidate(blocks(width=400, height=100))),
    "black": (filters.bad_exposure, lambda: candidate(flat(2))),
    "white": (filters.bad_exposure, lambda: candidate(flat(253))),
    "fog": (filters.bad_exposure, lambda: candidate(flat(128))),
    "out of focus": (filters.blurred, lambda: candidate(blocks().filter(ImageFilter.GaussianBlur(12)))),
}
BROKEN_BOXES: dict[str, tuple[Callable, Photo]] = {
    "tiny": (filters.subject_small, boxed(0.5, 0.5, 0.59, 0.6)),
    "inverted": (filters.subject_small, boxed(0.6, 0.5, 0.5, 0.6)),
    "nearly all": (filters.subject_large, boxed(0.01, 0.01, 0.99, 0.99)),
    "cut at three sides": (filters.subject_cut, boxed(0.0, 0.4, 1.0, 0.999)),
    "two of a class": (filters.several_instances, boxed(0.1, 0.1, 0.5, 0.5, instances=2)),
    "group": (filters.unwanted_attribute, boxed(0.1, 0.1, 0.5, 0.5, attributes=("occluded", "group_of"))),
    "truncated": (filters.unwanted_attribute, boxed(0.1, 0.1, 0.5, 0.5, attributes=("truncated",))),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_photo_is_dropped_by_its_own_filter_alone_with_the_measured_value(what, limits):
    breaks, make = BROKEN[what]
    broken = make()
    reason = breaks(broken, limits)
    assert reason == filters.first_reason(broken, filters.OF_PIXELS, limits)
    assert reason is not None and reason[0] == breaks.__name__ and reason[1]
    assert reason[0] in tables.REJECT_REASONS
    others = [f for f in filters.OF_PIXELS if f not in (breaks, filters.blurred)]  # what is flat has no edges either
    assert all(f(broken, limits) is None for f in others)


def cut_out(background: int, side: int, noise: float = 0.0) -> Candidate:
    """A photo of 512 x 384 px with coloured blocks of `side` x `side` px and a line on black or white."""
    rng = np.random.default_rng(0)
    pixels = background + rng.normal(0, noise, (384, 512, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.paste(blocks(width=side, height=side), (200, 100))
    image.paste((255 - background,) * 3, (10, 370, 400, 371))
    return candidate(image)


@pytest.mark.parametrize("background", [0, 255])
def test_sharp_cut_out_on_black_or_white_is_kept_and_one_that_is_lost_is_dropped(background, limits):
    assert filters.first_reason(cut_out(background, 70), filters.OF_PIXELS, limits) is None
    assert filters.first_reason(cut_out(background, 70, noise=2), filters.OF_PIXELS, limits) is None
    lost = filters.first_reason(cut_out(background, 12, noise=3), filters.OF_PIXELS, limits)
    assert lost is not None and lost[0] == "bad_exposure"


@pytest.mark.parametrize("what", BROKEN_BOXES)
def test_bad_annotation_is_dropped_by_its_own_filter_alone(what, limits):
    breaks, broken = BROKEN_BOXES[what]
    reason = filters.first_reason(broken, filters.OF_ANNOTATIONS, limits)
    assert reason is not None and reason == breaks(broken, limits) and reason[1]
    assert reason[0] in tables.REJECT_REASONS
    assert all(f(broken, limits) is None for f in filters.OF_ANNOTATIONS if f is not breaks)


def test_every_attribute_can_rule_a_box_out_and_has_a_reason(limits):
    every = limits.model_copy(update={"attributes": ATTRIBUTES})
    none = limits.model_copy(update={"attributes": ()})
    for name in ATTRIBUTES:
        box = boxed(0.1, 0.1, 0.5, 0.5, attributes=(name,))
        assert filters.unwanted_attribute(box, every) == (name, "annotated")
        assert name in tables.REJECT_REASONS
        assert filters.unwanted_attribute(box, none) is None


@pytest.mark.parametrize(
    "image",
    [
        blocks(),
        blocks(width=64, height=64),
        blocks(width=300, height=100),
        blocks().filter(ImageFilter.GaussianBlur(1)),
        blocks(width=2000, height=1500),
    ],
)
def test_good_photo_passes_every_filter(image, limits):
    assert filters.first_reason(candidate(image), filters.OF_PIXELS, limits) is None


@pytest.mark.parametrize(
    "good",
    [
        Photo("s/0", "0.jpg"),
        boxed(0.0, 0.0, 0.9, 0.9),
        boxed(0.4, 0.4, 0.55, 0.55),
        boxed(0.1, 0.1, 0.5, 0.5, attributes=("occluded",)),
        boxed(0.1, 0.1, 0.5, 0.5, instances=0),
    ],
)
def test_good_annotation_passes_every_filter(good, limits):
    assert filters.first_reason(good, filters.OF_ANNOTATIONS, limits) is None


def test_thresholds_are_limits_that_still_pass(limits):
    exact = limits.model_copy(update={"min_side": 90, "max_aspect": 120 / 90})
    assert filters.first_reason(candidate(blocks()), filters.OF_PIXELS, exact) is None
    exact = limits.model_copy(update={"min_subject_area": 0.25, "max_subject_area": 0.25, "max_instances": 3})
    assert filters.first_reason(boxed(0.0, 0.0, 0.5, 0.5, instances=3), filters.OF_ANNOTATIONS, exact) is None


def test_first_broken_filter_is_the_reason(limits):
    reason = filters.first_reason(candidate(flat(0).resize((400, 20))), filters.OF_PIXELS, limits)
    assert reason is not None and reason[0] == "too_small"


def test_sharpness_does_not_depend_on_the_resolution_of_a_large_photo(limits):
    large = blocks(width=600, height=480).resize((1200, 960), Image.Resampling.LANCZOS)
    small = large.resize((600, 480), Image.Resampling.LANCZOS)
    measured = [candidate(image, side=limits.sharpness_side).sharpness for image in (large, small)]
    assert measured[0] == pytest.approx(measured[1], rel=0.25)


def test_small_photo_is_not_enlarged_before_sharpness_is_measured():
    assert candidate(blocks(width=70, height=64)).grey.shape == (64, 70)
    assert candidate(blocks(width=1024, height=512)).grey.shape == (256, 512)


@pytest.mark.parametrize("again", ["smaller", "worse", "both"])
def test_photo_saved_again_is_the_same_picture_and_another_is_not(again, limits):
    image = blocks(1, 240, 180).filter(ImageFilter.GaussianBlur(2))
    seen = {"a/0": candidate(blocks(width=240, height=180)).phash, "a/1": candidate(image).phash}
    saved = image.resize((120, 90), Image.Resampling.LANCZOS) if again != "worse" else image
    if again != "smaller":
        saved = Image.open(io.BytesIO(encoded(saved, "JPEG", quality=60)))
    assert filters.near_duplicate(candidate(saved).phash, seen, limits.duplicate_bits) == "a/1"
    assert filters.near_duplicate(candidate(blocks(2)).phash, seen, limits.duplicate_bits) is None
    assert filters.near_duplicate(candidate(saved).phash, {}, limits.duplicate_bits) is None


@given(st.binary(min_size=32, max_size=32), st.sets(st.integers(0, 255)), st.integers(0, 256))
def test_near_duplicates_differ_in_at_most_so_many_bits(phash, bits, limit):
    other = int.from_bytes(phash)
    for bit in bits:
        other ^= 1 << bit
    found = filters.near_duplicate(other.to_bytes(32), {"x": phash}, limit)
    assert (found == "x") == (len(bits) <= limit)
