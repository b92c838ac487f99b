"""Which image encoder a pipeline loads, and what stands for no image."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from model.adapter import Adapter
from model.backbones.features.source import feature_source
from model.backbones.features.towers import TwoTowers
from model.backbones.variant import load_variant
from model.methods import customcontrast
from model.methods.registry import METHODS
from model.pipeline import build_pipeline
from runtime.errors import ModelError
from tests.world.subject import photo


@pytest.fixture
def of_two_towers(tiny_sd, monkeypatch):
    """A pipeline of a method that reads the toybox's two towers, without its image encoder."""
    monkeypatch.setitem(METHODS, "realcustom_pp", replace(customcontrast.METHOD, name="realcustom_pp"))
    variant = load_variant("toybox")
    source = feature_source(variant, "realcustom_pp")
    adapter = Adapter.for_unet(
        tiny_sd.unet,
        base_model=tiny_sd.name,
        base_revision=tiny_sd.revision,
        image_encoder=source.name,
        feature_layers=source.layers,
        feature_width=source.shape[-1],
        text_widths=[encoder.config.hidden_size for encoder in tiny_sd.text_encoders],
        encoder="realcustom_pp",
        width=16,
        heads=2,
        fourier_pairs=8,
    )
    return build_pipeline(tiny_sd, adapter, variant=variant)


def test_two_towers_are_loaded_for_the_method_that_reads_them(of_two_towers):
    segment = photo()[0]
    features, counts = of_two_towers.hidden_states([segment], 1)
    assert isinstance(of_two_towers.image_encoder, TwoTowers) and counts == [1]
    source = feature_source(of_two_towers.variant, "realcustom_pp")
    assert torch.equal(features, source.load("cpu").hidden_states([segment], source.layers))


def test_black_features_are_computed_once(of_two_towers, monkeypatch):
    black = of_two_towers.black_features()
    assert torch.equal(black[0], of_two_towers.encoder().hidden_states([Image.new("RGB", (9, 9))], range(5))[0])
    monkeypatch.setattr(TwoTowers, "hidden_states", pytest.fail)
    assert torch.equal(of_two_towers.black_features(), black)


def test_towers_that_split_otherwise_are_refused(of_two_towers):
    variant = of_two_towers.variant
    tiles = variant.model_copy(update={"detail": variant.detail.model_copy(update={"split": "tiles"})})
    of_two_towers.variant = tiles
    with pytest.raises(
        ModelError, match=r"trained on image encoder '.*interleave 64 px', but '.*tiles 64 px' is loaded"
    ):
        of_two_towers.hidden_states([photo()[0]], 1)
