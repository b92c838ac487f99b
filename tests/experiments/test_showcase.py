"""The sheet of the README."""

from __future__ import annotations

from PIL import Image

from experiments import showcase
from experiments.showcase import GAP, HEAD, TILE
from pipelines.toybox.prompts import asked, prompt


def test_columns_ask_for_what_the_toybox_knows() -> None:
    for answer in showcase.COLUMNS.values():
        assert asked(prompt(answer, "duck")) == answer


def test_sheet_has_a_row_of_images_for_each_photo() -> None:
    photos = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime")]
    images = [[Image.new("RGB", (64, 64), "blue")] * 2] * 2
    page = showcase.sheet(photos, images, ["a", "b"])
    assert page.size == (3 * (TILE + GAP) + 3 * GAP, HEAD + 2 * (TILE + GAP))
    middle = HEAD + TILE // 2
    assert page.getpixel((GAP + TILE // 2, middle)) == (255, 0, 0)
    assert page.getpixel((GAP + TILE // 2, middle + TILE + GAP)) == (0, 255, 0)
    assert page.getpixel((page.width - GAP - TILE // 2, middle)) == (0, 0, 255)
