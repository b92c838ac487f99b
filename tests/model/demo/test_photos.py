"""Masks on the page: found, corrected by clicks, taken back."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from model.demo.photos import SHOWN, Click, open_photos
from runtime.errors import ModelError
from tests.world.subject import photo


class FakeSam:
    """Its mask is the box, or the half of the photo with the first point; it follows no point on the background."""

    def __init__(self):
        self.prompts = []

    def embed(self, image):
        return (image.height, image.width)

    def mask_of(self, embedded, box, points):
        self.prompts.append((box, list(points)))
        mask = np.zeros(embedded, dtype=bool)
        left, upper, right, lower = (0, 0, embedded[1] // 2, embedded[0]) if box is None else map(int, box)
        mask[upper:lower, left:right] = True
        return mask, 1.0


class FakeDetector:
    """Finds a box, or nothing; it knows no zebra."""

    def __init__(self, box=(5.0, 10.0, 25.0, 20.0)):
        self.box, self.phrases = box, []

    def knows(self, phrase):
        return phrase != "zebra"


class FakeModels:
    """Grounded SAM with these parts."""

    def __init__(self, box=(5.0, 10.0, 25.0, 20.0)):
        self.detector, self.sam = FakeDetector(box), FakeSam()

    def detect(self, images, phrases):
        self.detector.phrases += phrases
        return [None if self.detector.box is None else SimpleNamespace(box=self.detector.box)]


@pytest.fixture
def opened(tmp_path):
    """A photo of 40 x 30 pixels; the subject fills x 5..25, y 10..20."""
    image, mask = photo()
    image.save(tmp_path / "cup.png")
    (own,) = open_photos([tmp_path / "cup.png"])
    return own, mask


def test_mask_is_found_once_per_noun_and_clicks_belong_to_it(opened):
    own, mask = opened
    models = FakeModels()
    own.find("mug", lambda: models)
    assert np.array_equal(own.mask, mask)
    own.click(Click(30, 5, True, 1), lambda: models)
    own.find("mug", lambda: models)
    assert models.detector.phrases == ["mug"] and len(own.clicks) == 1
    own.find("cup", lambda: models)
    assert models.detector.phrases == ["mug", "cup"] and own.clicks == [] and np.array_equal(own.mask, mask)


def test_clicks_prompt_sam_and_change_a_spot_where_it_does_not_follow(opened):
    own, mask = opened
    models = FakeModels()
    own.find("mug", lambda: models)
    own.click(Click(15.5, 15.5, False, 2), lambda: models)
    assert models.sam.prompts[-1] == (models.detector.box, [(15.5, 15.5, False)])
    changed = mask & ~own.mask
    rows, columns = np.nonzero(changed)
    assert len(rows) == 13 and (rows.mean(), columns.mean()) == (15, 15)  # the disc of radius 2
    assert np.array_equal(own.mask | changed, mask)
    own.undo(lambda: models)
    assert np.array_equal(own.mask, mask)
    own.undo(lambda: models)
    assert np.array_equal(own.mask, mask)


def test_click_on_the_subject_outside_the_box_drops_the_box(opened):
    own, _ = opened
    models = FakeModels()
    own.find("mug", lambda: models)
    own.click(Click(15, 15, True, 2), lambda: models)
    assert models.sam.prompts[-1][0] == models.detector.box
    own.click(Click(2, 2, True, 2), lambda: models)
    assert models.sam.prompts[-1] == (None, [(15, 15, True), (2, 2, True)])
    assert own.mask[:, :20].all() and not own.mask[:, 20:].any()


def test_subject_that_is_not_found_is_marked_by_a_click(opened):
    own, _ = opened
    models = FakeModels(box=None)
    own.find("mug", lambda: models)
    with pytest.raises(ModelError, match=r"cup.png: the mask is empty; click on the subject"):
        own.cut_out()
    own.click(Click(30, 3, False, 2), lambda: models)
    assert models.sam.prompts == [] and not own.mask.any()
    own.click(Click(3, 3, True, 2), lambda: models)
    assert own.mask[3, 3] and own.cut_out().size[0] == own.cut_out().size[1]


def test_transparent_file_brings_its_mask_and_needs_no_model(tmp_path):
    image, mask = photo()
    image.putalpha(Image.fromarray(mask))
    image.save(tmp_path / "cut.png")
    (own,) = open_photos([tmp_path / "cut.png"])
    own.find("mug", None)
    assert np.array_equal(own.mask, mask)
    own.click(Click(1, 1, True, 1), None)
    assert own.mask[1, 1] and own.mask[10:20, 5:25].all()
    assert np.array_equal(np.asarray(own.transparent())[..., 3] > 0, own.mask)


def test_noun_that_the_detector_does_not_know_is_one_sentence(opened):
    with pytest.raises(ModelError, match="does not know the class noun 'zebra'"):
        opened[0].find("zebra", FakeModels)


def test_broken_file_is_one_sentence_with_its_name(tmp_path):
    (tmp_path / "cup.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(ModelError, match=r"^cup.png: cannot be read as an image \(.*\); give a JPEG or PNG$"):
        open_photos([tmp_path / "cup.png"])


@pytest.mark.parametrize("size", [(40, 30), (64, 64), (1200, 700)])
def test_place_on_the_overview_is_the_pixel_of_the_photo(size, tmp_path):
    Image.new("RGB", size).save(tmp_path / "a.png")
    (own,) = open_photos([tmp_path / "a.png"])
    shown = own.overview().size
    assert max(shown) <= SHOWN and own.place(0, 0) == (0, 0)
    assert own.place(*shown) == pytest.approx(size)
    assert own.place(shown[0] / 2, shown[1] / 4) == pytest.approx((size[0] / 2, size[1] / 4))
