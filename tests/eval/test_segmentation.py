import numpy as np

from eval import segmentation
from model.backbones.grounded_sam import Detection


class OneBox:
    """Detects with the given scores; segments nothing where the box is empty."""

    def __init__(self, *scores):
        self.scores = scores

    def detect(self, images, phrases):
        return [None if s is None else Detection((0, 0, 4, 4), s) for s in self.scores]

    def segment(self, images, boxes):
        return [np.full((4, 4), image == "full") for image in images], [1.0] * len(images)


def test_a_subject_is_missed_without_a_detection_below_the_threshold_or_with_an_empty_mask():
    pictures = ["full", "full", "full", "empty"]
    found = segmentation.find_subjects(OneBox(0.9, None, 0.2, 0.9), pictures, "duck", 0.25, 0.1)
    assert [mask is not None for mask in found] == [True, False, False, False]


def test_specks_do_not_widen_the_crop():
    mask = np.zeros((20, 20), dtype=bool)
    mask[8:14, 8:14] = True
    mask[0, 0] = mask[19, 19] = True
    mask[2:4, 2:4] = True  # 4 of 36 pixels: a part of the subject
    kept = segmentation.without_specks(mask, 0.1)
    assert kept.sum() == 40
    assert not kept[0, 0]
