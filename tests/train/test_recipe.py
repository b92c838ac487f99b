from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pydantic
import pytest

from model.backbones.features.source import feature_source
from model.backbones.variant import Variant, load_variant
from runtime.params import Params
from tests.world.training import write_world
from train.recipe import DropParams, ModelParams, TrainParams, input_digest, recipe
from train.run import backbone


@pytest.mark.parametrize("schedule,last", [("constant", 1e-3), ("cosine", 0.0)])
def test_learning_rate_warms_up_and_follows_its_schedule(params: TrainParams, schedule: str, last: float):
    short = params.model_copy(update={"steps": 100, "warmup": 10, "schedule": schedule, "learning_rate": 1e-3})
    rates = [short.learning_rate_at(step) for step in range(100)]
    assert rates[:3] == pytest.approx([1e-4, 2e-4, 3e-4])
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(last, abs=1e-6)


def test_recipe_holds_what_the_weights_depend_on_and_nothing_else(params: TrainParams):
    model = Params.read().section("model", ModelParams)
    same = recipe(params, model, data="a")
    assert json.loads(json.dumps(same)) == same  # as it is read again from the run's folder
    assert recipe(params.model_copy(update={"checkpoint_every": 7}), model, data="a") == same
    for other in (
        recipe(params.model_copy(update={"seed": 5}), model, data="a"),
        recipe(params, model.model_copy(update={"width": 32}), data="a"),
        recipe(params, model, data="b"),
    ):
        assert other != same


def test_recipe_holds_how_the_frozen_models_are_used():
    variant = load_variant("sd15")

    def of(variant: Variant, method: str = "mfi") -> dict[str, Any]:
        return backbone("model", "r", feature_source(variant, method), variant)

    same = of(variant)
    encoder = variant.image_encoder.model_copy(update={"layers": (1, 2, 3)})
    diffusion = variant.diffusion.model_copy(update={"weights": None})
    for change in ({"image_encoder": encoder}, {"diffusion": diffusion}, {"resolution": 768}):
        assert of(variant.model_copy(update=change)) != same
    assert of(variant, "realcustom_pp") != same
    assert json.loads(json.dumps(same)) == same  # as it is read again from the run's folder


def test_input_digest_changes_with_any_byte_of_a_table(tmp_path: Path):
    data = write_world(tmp_path / "data", views=2, single=0).data
    before = input_digest(data)
    assert input_digest(data) == before
    part = data / "encode" / "latents" / "part-00000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert input_digest(data) != before


def test_conditions_cannot_be_dropped_more_than_always():
    with pytest.raises(pydantic.ValidationError, match="add up to"):
        DropParams(image=0.4, text=0.4, both=0.4)
