"""Model cards of the toybox's weights: current, complete, and none where it would change what results are known by."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from model.adapter import Adapter, read_card
from model.backbones.variant import Spec, load_variant
from model.card import read_about
from runtime.closure import ROOT
from train.toybox.model_cards import ADAPTERS, BACKBONES, FACE_BACKBONES, FACES, PAGE, WEIGHTS, cards, page

CARDS = dict(cards(ROOT))


@pytest.mark.parametrize("file", CARDS, ids=lambda file: str(file.relative_to(ROOT)))
def test_card_is_current(file: Path):
    assert file.read_text(encoding="utf-8") == CARDS[file], "run make cards"


@pytest.mark.parametrize(
    ("weights", "names"), [(WEIGHTS, {*ADAPTERS, *BACKBONES}), (FACES, {*FACE_BACKBONES})], ids=["toys", "faces"]
)
def test_every_folder_of_weights_has_a_card(weights: Path, names: set[str]):
    if not (ROOT / weights).exists():
        pytest.skip(f"{weights} is not there; run make facebox")
    folders = {str(file.parent.relative_to(ROOT / weights)) for file in (ROOT / weights).rglob("card.json")}
    assert folders == names
    text = (ROOT / PAGE).read_text()
    assert all(f"[{name}](../{weights}/{name}/card.json)" in text for name in names - {*ADAPTERS})


def test_the_page_has_the_world_of_faces_once_it_is_trained():
    toys = {name: read_card(ROOT / WEIGHTS / name) for name in BACKBONES}
    assert "weights/faces" not in page(toys, {})
    told = page(toys, {"face": toys["dino"]})
    assert f"[face](../{FACES}/face/card.json)" in told and "make facebox-check" in told
    assert told.startswith(page(toys, {}))


@pytest.mark.parametrize("name", ADAPTERS)
def test_pushed_adapter_would_have_the_card_of_its_folder(name: str, tmp_path: Path):
    folder = ROOT / WEIGHTS / name
    assert read_about(read_card(folder), name) == ADAPTERS[name]
    Adapter.load(folder).save_pretrained(tmp_path, name=str(WEIGHTS / name))
    for file in ("README.md", "card.json"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), file
    assert ModelCard((folder / "README.md").read_text()).data.license == "apache-2.0"


def test_folders_whose_digest_names_results_hold_no_card():
    variant = load_variant("toybox")
    specs = [spec for spec in vars(variant).values() if isinstance(spec, Spec)]
    for spec in [*specs, Spec(path=f"{WEIGHTS}/judge")]:
        assert not list(spec.local.rglob("README.md")), spec.path
