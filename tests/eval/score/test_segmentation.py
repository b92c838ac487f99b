import numpy as np
import pytest
from PIL import Image

from eval.score import segmentation
from model.backbones.grounded_sam import Cut, Detection
from pipelines import tables


class OneBox:
    """Answers with the given detections and masks."""

    def __init__(self, *answers):
        self.answers = answers

    def prepare(self, image):
        return image

    def cut_out(self, photos, min_score):
        for (number, _, _), (score, mask) in zip(photos, self.answers, strict=True):
            found = None if score is None else Detection((0, 0, 4, 4), score)
            yield number, found, None if score is None or score < min_score else Cut(mask, 1.0)


@pytest.fixture
def generations(fakes):
    def rows(count):
        image = fakes.png(Image.new("RGB", (6, 4)))
        place = {"method": "m", "subject_id": "bench/duck", "group": "scene", "prompt_id": 0}
        return [{**place, "class_name": "duck", "index": index, "image": image} for index in range(count)]

    return rows


def finder(model, decoders=0):
    return segmentation.SubjectFinder(model, "the {class}", 0.25, 0.1, decoders, 2)


def test_a_subject_is_missed_without_a_detection_below_the_threshold_or_with_an_empty_mask(generations):
    full, empty = np.ones((4, 6), dtype=bool), np.zeros((4, 6), dtype=bool)
    model = OneBox((0.9, full), (None, full), (0.125, full), (0.9, empty))
    rows = finder(model)(generations(4))
    assert [row["segmented"] for row in rows] == [True, False, False, False]
    assert [row["rle"] is None for row in rows] == [False, True, True, True]
    assert [row["score"] for row in rows] == [0.9, None, 0.125, 0.9], "what was found is told, however unsure"
    assert [row["box"] for row in rows] == [[0, 0, 4, 4], None, [0, 0, 4, 4], [0, 0, 4, 4]]
    assert [segmentation.mask_of(row) is None for row in rows] == [False, True, True, True]
    tables.from_rows("segmentations", rows)


def test_masks_come_back_as_they_were_found_in_the_order_of_the_pictures(generations, fakes):
    rows = generations(2)
    picture, _ = fakes.draw((230, 180, 20), 0, (90, 120, 90))
    rows[1]["image"] = fakes.png(picture)
    model = fakes.Segmenter()
    first, second = finder(model, decoders=2)(rows)
    assert (first["segmented"], first["height"], first["width"]) == (False, 4, 6)
    assert (second["segmented"], second["height"], second["width"]) == (True, fakes.side, fakes.side)
    mask = segmentation.mask_of(second)
    assert mask.sum() == 130 and not mask[0, 0] and mask[5:18, 4:14].all()
    assert model.asked == ["the duck", "the duck"]


def test_specks_do_not_widen_the_crop():
    mask = np.zeros((20, 20), dtype=bool)
    mask[8:14, 8:14] = True
    mask[0, 0] = mask[19, 19] = True
    mask[2:4, 2:4] = True  # 4 of 36 pixels: a part of the subject
    kept = segmentation.without_specks(mask, 0.1)
    assert kept.sum() == 40
    assert not kept[0, 0]
