"""Each filter on a photo made to break it, and on one that passes."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from pipelines import filters, tables
from pipelines.curate import CurateParams
from pipelines.filters import Candidate


@pytest.fixture(scope="module")
def limits(section) -> filters.FilterParams:
    return section("curate", CurateParams).filters


def photo(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
    """Coloured blocks of 6 px with some noise: edges, contrast, middle brightness."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(30, 226, (height // 6 + 1, width // 6 + 1, 3)).repeat(6, 0).repeat(6, 1)[:height, :width]
    return Image.fromarray((blocks + rng.integers(-9, 10, blocks.shape)).clip(0, 255).astype(np.uint8))


def candidate(image: Image.Image, box=None, side: int = 256) -> Candidate:
    return Candidate(image, box, side)


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (120, 90), (value, value, value))


BROKEN: dict[str, tuple[Callable, Callable[[], Candidate]]] = {
    "too small": (filters.too_small, lambda: candidate(photo(180, 63))),
    "too long": (filters.bad_aspect, lambda: candidate(photo(400, 100))),
    "black": (filters.bad_exposure, lambda: candidate(flat(2))),
    "white": (filters.bad_exposure, lambda: candidate(flat(253))),
    "fog": (filters.bad_exposure, lambda: candidate(flat(128))),
    "out of focus": (filters.blurred, lambda: candidate(photo().filter(ImageFilter.GaussianBlur(12)))),
    "tiny subject": (filters.subject_small, lambda: candidate(photo(), (0.5, 0.5, 0.59, 0.6))),
    "inverted box": (filters.subject_small, lambda: candidate(photo(), (0.6, 0.5, 0.5, 0.6))),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_photo_is_dropped_by_its_own_filter_alone_with_the_measured_value(what, limits):
    breaks, make = BROKEN[what]
    broken = make()
    reason = breaks(broken, limits)
    assert reason == filters.first_reason(broken, limits)
    assert reason is not None and reason[0] == breaks.__name__ and reason[1]
    assert reason[0] in tables.REJECT_REASONS
    others = [f for f in filters.FILTERS if f not in (breaks, filters.blurred)]  # what is flat has no edges either
    assert all(f(broken, limits) is None for f in others)


@pytest.mark.parametrize(
    "image", [photo(), photo(64, 64), photo(300, 100), photo().filter(ImageFilter.GaussianBlur(1)), photo(2000, 1500)]
)
@pytest.mark.parametrize("box", [None, (0.0, 0.0, 1.0, 1.0), (0.4, 0.4, 0.5, 0.51)])
def test_good_photo_passes_every_filter(image, box, limits):
    assert filters.first_reason(candidate(image, box), limits) is None


def test_thresholds_are_limits_that_still_pass(limits):
    exact = limits.model_copy(update={"min_side": 90, "max_aspect": 120 / 90, "min_subject_area": 0.25})
    assert filters.first_reason(candidate(photo(), (0.0, 0.0, 0.5, 0.5)), exact) is None


def test_first_broken_filter_is_the_reason(limits):
    assert filters.first_reason(candidate(flat(0).resize((400, 20))), limits)[0] == "too_small"


def test_sharpness_does_not_depend_on_the_resolution_of_a_large_photo(limits):
    large = photo(600, 480).resize((1200, 960), Image.Resampling.LANCZOS)
    small = large.resize((600, 480), Image.Resampling.LANCZOS)
    measured = [candidate(image, side=limits.sharpness_side).sharpness for image in (large, small)]
    assert measured[0] == pytest.approx(measured[1], rel=0.25)


def test_small_photo_is_not_enlarged_before_sharpness_is_measured():
    assert candidate(photo(70, 64)).grey.shape == (64, 70)
    assert candidate(photo(1024, 512)).grey.shape == (256, 512)


def test_same_photo_saved_again_is_a_near_duplicate_and_another_is_not():
    seen = {"a/0": candidate(photo()).phash, "a/1": candidate(photo(seed=1)).phash}
    smaller = candidate(photo(seed=1).resize((100, 75))).phash
    assert filters.near_duplicate(smaller, seen, 4) == "a/1"
    assert filters.near_duplicate(candidate(photo(seed=2)).phash, seen, 4) is None
    assert filters.near_duplicate(smaller, {}, 4) is None


@given(st.integers(0, 2**64 - 1), st.sets(st.integers(0, 63)), st.integers(0, 64))
def test_near_duplicates_differ_in_at_most_so_many_bits(phash, bits, limit):
    other = phash
    for bit in bits:
        other ^= 1 << bit
    assert (filters.near_duplicate(other, {"x": phash}, limit) == "x") == (len(bits) <= limit)


def test_hash_fits_its_column():
    row = {"phash": candidate(photo()).phash}
    assert 0 <= row["phash"] < 2**64
