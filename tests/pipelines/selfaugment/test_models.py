"""The stage's worker on the toybox's weights, with its DINO in the place of a face recogniser."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from model.backbones.features.face import IDENTITY
from model.backbones.variant import load_variant
from pipelines import tables
from pipelines.selfaugment.people import EditParams, NamedPerson, SelfAugmentParams, item
from pipelines.selfaugment.worker import SelfAugmentWorker, load_models
from runtime.closure import ROOT
from runtime.errors import UserError

WIDTH = 128
"""Of the toybox's DINO."""


@pytest.fixture
def variant(tmp_path: Path) -> str:
    folder = tmp_path / "face"
    shutil.copytree(ROOT / "weights/toybox/dino", folder)
    save_file({"weight": torch.eye(WIDTH), "bias": torch.zeros(WIDTH)}, folder / IDENTITY)
    tree = json.loads((ROOT / "model/backbones/toybox.json").read_text())
    file = tmp_path / "variant.json"
    file.write_text(json.dumps(tree | {"face": {"path": str(folder), "layers": [1, 3, 5]}}))
    return str(file)


@pytest.fixture
def params(section) -> SelfAugmentParams:
    few = dict.fromkeys(EditParams.model_fields, ()) | {
        "scene": ("{name} on a beach",),
        "style": ("a sketch of {name}",),
    }
    found: SelfAugmentParams = section(
        "selfaugment",
        SelfAugmentParams,
        plain="a photo of {name}",
        phrase="{class}",
        edits=few,
        seeds=2,
        plain_images=1,
        agreement=-1.0,
        min_detection=0.0,
        steps=2,
        batch_size=2,
    )
    return found


def test_pictures_are_made_and_measured_whoever_else_is_asked_for(variant, params):
    worker = SelfAugmentWorker(params, variant, "cpu")
    red, blue = (item(NamedPerson(f"a {colour} mug", "mug"), params) for colour in ("red", "blue"))
    (alone,), together = worker.compute([red.payload]), worker.compute([blue.payload, red.payload])
    assert alone == together[1] and alone != together[0]
    found = tables.from_rows("pictures", alone["pictures"]).to_pylist()
    assert [row["group"] for row in found] == ["plain", "scene", "style"]
    for row in found:
        image = Image.open(io.BytesIO(row["image"]))
        assert image.size == (64, 64) and json.loads(image.text["customcontrast"])["prompt"] == row["caption"]
        assert "red" not in row["caption"] and "a mug" in row["caption"]
        assert image.text["model"].startswith("weights/toybox/diffusion@")
        assert 0 < row["face"] <= 1 and -1 <= row["cosine"] <= 1 and -1 <= row["clip_t"] <= 1
    assert alone["people"][0]["known"] and -1 <= alone["people"][0]["agreement"] <= 1


def test_a_variant_without_a_face_recogniser_is_one_sentence(params):
    with pytest.raises(UserError, match="variant 'toybox' names no face recogniser; add `face`"):
        load_models(params, load_variant("toybox"), "cpu")
