"""What a run will take of each device, told before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.backbones.diffusion import load_diffusion
from model.backbones.variant import load_variant
from model.dry.shapes import SD15, TINY, TINY_XL
from runtime.errors import UserError
from runtime.params import Params
from tests.world.training import CHANNELS, LAYERS, SIDE, TOKENS, WIDTH
from train.distributed import memory
from train.distributed.memory import Memory, StepMemory, estimate, shapes_of, spread, table, weigh
from train.recipe import ModelParams, TrainParams
from train.trainer import make_adapter

STEP = StepMemory(frozen=10**9, trained=10**8, activations=5 * 10**9)


@pytest.fixture(scope="module")
def small() -> ModelParams:
    sizes = {"width": 16, "heads": 2, "depth": 1, "visual_tokens": 3, "fourier_pairs": 8}
    return Params.read().section("model", ModelParams).model_copy(update=sizes)


def spread_as(**changes: object) -> Memory:
    params = (
        Params.read().section("train", TrainParams).model_copy(update={"precision": "bf16", "zero_stage": 0, **changes})
    )
    return spread(STEP, params, 8)


def test_each_stage_spreads_what_deepspeed_spreads_under_it():
    found = [spread_as(zero_stage=stage) for stage in range(4)]
    bucket = 2 * memory.BUCKET
    # bf16: 2 bytes a weight and gradient; float32 weights and two moments are 12.
    assert [m.optimizer for m in found] == [12 * 10**8, 15 * 10**7, 15 * 10**7, 15 * 10**7]
    assert [m.gradients for m in found] == [2 * 10**8, 2 * 10**8 + bucket, 25 * 10**6 + bucket, 25 * 10**6 + bucket]
    assert [m.trained for m in found] == [2 * 10**8] * 3 + [25 * 10**6]
    assert [m.frozen for m in found[:3]] == [2 * 10**9] * 3
    # An eighth of all, and what is gathered up to DeepSpeed's 10^9 numbers.
    assert found[3].frozen + found[3].trained == 2 * 10**9
    assert {m.activations for m in found} == {STEP.activations} and {m.host for m in found} == {0}
    assert all(m.total == m.frozen + m.trained + m.gradients + m.optimizer + m.activations for m in found)


def test_precision_average_and_offload_have_their_bytes():
    assert spread_as(precision="fp32").optimizer == 8 * 10**8
    assert spread_as(precision="fp32", zero_stage=1).optimizer == 12 * 10**8 // 8
    assert spread_as(ema=0.999).optimizer == 16 * 10**8
    away = spread_as(zero_stage=2, offload="optimizer")
    assert away.optimizer == 0 and away.host > 12 * 10**8 // 8
    everything = spread_as(zero_stage=3, offload="all")
    assert everything.frozen == 2 * 10**9 and everything.trained == 0
    large = replace(STEP, frozen=4 * 10**9)
    params = Params.read().section("train", TrainParams).model_copy(update={"precision": "bf16", "zero_stage": 3})
    assert spread(large, params, 8).frozen < 0.4 * 2 * large.frozen


def test_activations_grow_with_the_samples_and_fall_with_checkpointing(small: ModelParams):
    params = Params.read().section("train", TrainParams)
    one, four = (weigh(TINY_XL, small, params, rows) for rows in (1, 4))
    saved = weigh(TINY_XL, small, params.model_copy(update={"gradient_checkpointing": "all"}), 4)
    assert one.trained == four.trained > 0 and one.frozen == four.frozen > 0
    assert 2.5 * one.activations < four.activations < 4.5 * one.activations
    assert saved.activations < four.activations


def test_numbers_are_those_of_the_loaded_model_and_kept_for_the_next_start(
    params: TrainParams, small: ModelParams, variant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny = load_variant(str(variant))
    diffusion = load_diffusion(tiny.diffusion, torch.float32, "cpu")
    frozen = [p.numel() for part in (diffusion.unet, *diffusion.text_encoders) for p in part.parameters()]
    tables: Any = SimpleNamespace(latent_shape=(CHANNELS, SIDE, SIDE), hidden_shape=(LAYERS, TOKENS, WIDTH))
    trained = [p.numel() for p in make_adapter(small, tiny, diffusion, tables, seed=0).parameters()]
    first = estimate(params, small, tiny, 2, tmp_path)
    assert (first.frozen, first.trained) == (4 * sum(frozen), 4 * sum(trained))
    monkeypatch.setattr(memory, "weigh", pytest.fail)
    assert estimate(params, small, tiny, 2, tmp_path) == first
    assert estimate(params.model_copy(update={"zero_stage": 1}), small, tiny, 2, tmp_path).total > first.total
    assert shapes_of(tiny, small.features(tiny)).size == SIDE


def weighed(shapes: object, model: object, params: TrainParams, rows: int) -> StepMemory:
    """A step that keeps more where text encoders are computed again layer by layer, as under ZeRO 3."""
    return replace(STEP, activations=STEP.activations + 3 * 10**9 * (params.zero_stage == 3))


def test_a_step_under_zero_3_is_weighed_by_itself(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "weigh", weighed)
    params, variant = Params.read().section("train", TrainParams), load_variant("toybox")
    stages = [params.model_copy(update={"zero_stage": stage}) for stage in (0, 3, 0)]
    activations = [estimate(stage, small, variant, 1, tmp_path).activations for stage in stages]
    assert activations == [STEP.activations, STEP.activations + 3 * 10**9, STEP.activations]


def test_table_has_a_row_for_each_model_and_size(small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "weigh", weighed)
    lines = list(table(Params.read().section("train", TrainParams), small, 8, {"tiny": TINY}))
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["tiny, 512", "tiny, 768", "tiny, 1024"]
    assert {line.count("|") for line in lines} == {9}
    staged = [
        Params.read().section("train", TrainParams).model_copy(update={"zero_stage": stage}) for stage in range(4)
    ]
    totals = [spread(weighed(TINY, small, params, 1), params, 8).total for params in staged]
    assert [cell.strip() for cell in lines[2].split("|")[5:9]] == [f"{total / 1e9:.1f}" for total in totals]


@pytest.mark.parametrize(("shallow", "views"), [(False, 5), (True, 8)])
def test_table_weighs_the_features_that_the_method_reads(small, monkeypatch: pytest.MonkeyPatch, shallow, views):
    seen = []
    monkeypatch.setattr(memory, "weigh", lambda shapes, *given: seen.append(shapes) or weighed(shapes, *given))
    projector = small.projector.model_copy(update={"shallow": shallow})
    model = small.model_copy(update={"encoder": "realcustom_pp", "projector": projector})
    list(table(Params.read().section("train", TrainParams), model, 8, {"SD 1.5": SD15}))
    assert {(found.layers, found.tokens, found.vision["hidden_size"]) for found in seen} == {(views, 729, 2176)}


def test_table_without_a_published_recogniser_is_one_sentence(small):
    model = small.model_copy(update={"encoder": "dreamidentity"})
    with pytest.raises(UserError, match="no published face recogniser for dreamidentity; leave it out"):
        list(table(Params.read().section("train", TrainParams), model, 8, {"SD 1.5": SD15}))
