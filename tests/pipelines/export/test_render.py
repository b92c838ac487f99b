"""The images of a pair: cropped, cut out, and their masks and boxes."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from model.images.segment import on_white, square_crop
from pipelines.export import plan
from pipelines.export.options import ExportOptions
from pipelines.export.records import MEANINGS, record, schema
from pipelines.export.render import alone, encoded, encoded_mask, render, whole
from pipelines.photos.roots import Roots, SourceParams
from tests.world.exports import ANGLE, SMALL, params, write_tables
from tests.world.photos import blocks

PHOTO, MASK = blocks(0, 96, 72), np.zeros((72, 96), dtype=bool)
MASK[10:60, 20:50] = True


def test_target_is_the_square_that_training_crops():
    made = whole(PHOTO, MASK, SMALL)
    crop, mask = square_crop(PHOTO, MASK, 32)
    assert made.image.tobytes() == crop.tobytes() and (made.mask == mask).all()


def test_photo_of_any_shape_is_made_smaller_and_never_larger():
    made = whole(PHOTO, MASK, replace(SMALL, crop="none"))
    assert made.image.size == (32, 24) and made.mask.shape == (24, 32)
    assert made.box() == [7, 3, 17, 20]  # 20..50 and 10..60, divided by three
    kept = whole(PHOTO, MASK, ExportOptions(size=500, crop="none"))
    assert kept.image.tobytes() == PHOTO.tobytes() and (kept.mask == MASK).all()


def test_reference_alone_is_what_the_adapter_reads_on_white_or_transparent():
    white = alone(PHOTO, MASK, SMALL)
    expected = on_white(PHOTO, MASK, SMALL.margin).resize((32, 32), Image.Resampling.LANCZOS)
    assert white.image.tobytes() == expected.tobytes()
    clear = alone(PHOTO, MASK, replace(SMALL, reference="alpha"))
    assert clear.image.mode == "RGBA" and (clear.mask == white.mask).all()
    assert clear.image.convert("RGB").tobytes() == expected.tobytes()  # readers that drop alpha see white
    alpha = np.asarray(clear.image)[..., 3]
    assert ((alpha >= 128) == clear.mask).all() and set(np.unique(alpha)) > {0, 255}
    height, width = 50, 30
    left, top, right, bottom = white.box() or [0] * 4
    assert (right - left) / (bottom - top) == pytest.approx(width / height, abs=0.06)
    assert abs((left + right) / 2 - 16) <= 0.5 and abs((top + bottom) / 2 - 16) <= 0.5


def test_encoding_keeps_transparency_and_masks_are_exact():
    clear = alone(PHOTO, MASK, replace(SMALL, reference="alpha")).image
    for encoding, suffix in (("jpeg", ".png"), ("png", ".png"), ("webp", ".webp")):
        found, data = encoded(clear, replace(SMALL, encoding=encoding))
        assert found == suffix and Image.open(io.BytesIO(data)).mode == "RGBA"
    suffix, data = encoded(PHOTO, SMALL)
    assert suffix == ".jpg" and len(encoded(PHOTO, replace(SMALL, quality=30))[1]) < len(data)
    suffix, data = encoded_mask(MASK)
    assert suffix == ".png" and (np.asarray(Image.open(io.BytesIO(data))) == 255 * MASK).all()


@pytest.mark.parametrize("views", [1, 2])
def test_record_has_the_columns_of_its_schema_each_with_a_meaning(views, tmp_path):
    options = replace(SMALL, views=views, fields=("mask", "box", "angle", "quality", "licence"))
    data = write_tables(tmp_path)
    roots = Roots(params(tmp_path).section("sources", list[SourceParams]))
    pair = [pair for item in plan.read(data, options) for pair in item.payload.pairs][5]
    found = record(pair, render(roots, pair, options), options)
    assert list(found) == schema(options).names
    assert found["class"] == "mug" and found["text"] == "a mug, view 1" and found["angle"] == ANGLE
    assert found["target_mask_score"] == 0.5 and found["target_sharpness"] == 12.5 and found["method"] == "pose"
    assert found["reference_licence"] is found["target_attribution"] is None and ("positive_frame" in found) == (
        views == 2
    )
    few = replace(options, fields=())
    assert schema(few).names == ["id", "subject", "class", "text", *(f"{role}_frame" for role in few.roles())]
    for name in schema(options).names:
        assert name in MEANINGS or any(end[0] == "_" and name.endswith(end) for end in MEANINGS)
