from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.adapter import Adapter
from runtime.errors import UserError
from runtime.params import parse
from tests.world.ranks import gather_everything, repeat_the_first_batch, run_ranks, trace_the_unet
from tests.world.training import World, write_options, write_world
from train.distributed.engine import part_of
from train.recipe import TrainParams

OUTS = ("adapter/adapter.safetensors", "adapter/adapter.json", "adapter/card.json", "losses.csv", "metrics.json")
# So often that ranks differ in how many of their samples have a location loss.
DROP = {"image": 0.2, "text": 0.2, "both": 0.1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world") / "data", views=10, single=2)


@pytest.fixture
def run(world: World, variant: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train with these values of the train section, and return the folder of the outs."""

    def trained(before: Callable[[int], None] | None = None, **train: Any) -> Path:
        data = tmp_path / "data"
        if not data.exists():
            shutil.copytree(world.data, data)
        ranks = train.setdefault("ranks", 2)
        words = write_options(tmp_path, variant, data, **{"steps": 2, **train})
        assert run_ranks(ranks, words, tmp_path / "output", before) == [0] * ranks, (tmp_path / "output").read_text()
        return data / "train"

    return trained


def rows(out: Path) -> list[dict[str, float]]:
    with (out / "losses.csv").open() as stream:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]


def content(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in OUTS}


def checkpoints(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "work" / "train").glob("*/step-*"))


def test_all_stages_compute_the_same(run: Callable[..., Path], tmp_path: Path):
    """ZeRO 3 with each weight sharded, those of the frozen UNet and text encoder among them."""
    wanted = rows(run(drop=DROP))
    for before, settings in (
        (None, {"zero_stage": 0}),
        (None, {"zero_stage": 1}),
        (None, {"zero_stage": 2, "ranks": 1}),
        (None, {"zero_stage": 2, "offload": "optimizer"}),
        (gather_everything, {"zero_stage": 3, "gradient_checkpointing": "all"}),
        (gather_everything, {"zero_stage": 3, "offload": "all"}),
    ):
        for row, other in zip(rows(run(before, drop=DROP, **settings)), wanted, strict=True):
            assert row == pytest.approx(other, rel=2e-4), settings
    # Each has another hash: what lies in the work folder is not gone on from.
    assert "goes on" not in (tmp_path / "output").read_text()


# Three ranks divide few of the weights.
@pytest.mark.parametrize("stage,precision,ranks", [*itertools.product(range(4), ("fp32", "bf16"), [2]), (3, "fp32", 3)])
def test_stopped_half_way_and_resumed_is_the_same_bytes(
    run: Callable[..., Path], tmp_path: Path, stage: int, precision: str, ranks: int
):
    before = gather_everything if stage == 3 else None
    settings = {"zero_stage": stage, "precision": precision, "steps": 3, "checkpoint_every": 2, "ema": 0.9}
    settings |= {"ranks": ranks, "batch": 6}
    wanted = content(run(before, **settings))
    shutil.rmtree(checkpoints(tmp_path)[-1])
    shutil.rmtree(tmp_path / "data" / "train")
    found = content(run(before, **settings))
    assert "goes on at step 2 of 3" in (tmp_path / "output").read_text()
    assert found == wanted


@pytest.mark.parametrize("stage,precision", [(0, "fp32"), (0, "bf16"), (2, "bf16"), (3, "fp32")])
def test_ema_is_the_formula_and_the_adapter_that_is_used(
    run: Callable[..., Path], tmp_path: Path, stage: int, precision: str
):
    before = gather_everything if stage == 3 else None
    out = run(before, zero_stage=stage, precision=precision, ema=0.9, checkpoint_every=1)
    first, second = (load_file(folder / "state.safetensors") for folder in checkpoints(tmp_path))
    decay = min(0.9, (1 + 2) / (10 + 2))
    averaged, raw = (load_file(out / "adapter" / place / "adapter.safetensors") for place in ("", "raw"))
    names = [name for name, _ in Adapter.load(out / "adapter").named_parameters()]
    for name in names:
        weights, average = second[f"weight/{name}"], second[f"ema/{name}"]
        torch.testing.assert_close(average, decay * first[f"ema/{name}"] + (1 - decay) * weights)
        assert torch.equal(raw[name], weights.to(raw[name].dtype))
        assert torch.equal(averaged[name], average.to(raw[name].dtype))
    assert any(not torch.equal(raw[name], averaged[name]) for name in names)


def test_outs_of_a_sharded_run_hold_the_adapter_alone_and_tell_what_it_is_of(run: Callable[..., Path], tmp_path: Path):
    out = run(gather_everything, zero_stage=3, precision="bf16", steps=1)
    adapter = Adapter.load(out / "adapter")
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    file = out / "adapter" / "adapter.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    size = sum(t.numel() * t.element_size() for t in (*adapter.parameters(), *adapter.buffers()))
    assert file.stat().st_size == header + size

    names = {name for name, _ in adapter.named_parameters()}
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    assert set(load_file(checkpoints(tmp_path)[-1] / "state.safetensors")) == {f"{k}/{n}" for k in kinds for n in names}

    card = json.loads((out / "adapter" / "card.json").read_text())
    metrics = json.loads((out / "metrics.json").read_text())
    assert card["recipe"]["data"] == adapter.data_hash
    assert card["recipe"]["base"]["model"] == adapter.config.base_model
    assert card["recipe"]["base"]["revision"] == adapter.config.base_revision
    assert card["recipe"]["train"]["precision"] == "bf16"
    assert card["losses"] == {name: metrics[name] for name in card["losses"]} and "total" in card["losses"]
    assert card["commit"] is None or len(card["commit"]) == 40
    assert str(tmp_path) not in (out / "adapter" / "card.json").read_text()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_parts_of_a_tensor_are_all_of_it_and_zeros(ranks: int):
    value = torch.arange(1.0, 6.0).reshape(5, 1)
    size = math.ceil(5 / ranks)
    parts = torch.stack([part_of(value, size, rank) for rank in range(ranks)]).flatten()
    assert torch.equal(parts[:5], value.flatten()) and not parts[5:].any()


def test_accumulated_step_is_the_mean_of_its_micro_steps(run: Callable[..., Path]):
    wanted = rows(run(repeat_the_first_batch, batch=4))
    for row, other in zip(rows(run(repeat_the_first_batch, batch=4, accumulation=2)), wanted, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


def test_micro_steps_draw_batches_of_their_own(params: TrainParams):
    assert [list(params.model_copy(update={"accumulation": 3}).draws(step)) for step in (0, 1)] == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    assert params.model_copy(update={"accumulation": 3}).samples == 24


def test_compiled_unet_computes_the_same(run: Callable[..., Path]):
    wanted = rows(run(ranks=1))
    for row, other in zip(rows(run(trace_the_unet, ranks=1, compile=True)), wanted, strict=True):
        assert row == pytest.approx(other, rel=2e-4)


@pytest.mark.parametrize(
    "values,said",
    [
        ({"zero_stage": 2, "offload": "all"}, "offload all needs zero_stage 3, and it is 2"),
        ({"zero_stage": 0, "offload": "optimizer"}, "offload optimizer needs zero_stage 1, 2 or 3"),
        ({"zero_stage": 3, "compile": True}, "compile does not go with zero_stage 3"),
        ({"zero_stage": 0, "precision": "fp16"}, "precision fp16 needs zero_stage 1, 2 or 3"),
    ],
)
def test_settings_that_do_not_go_together_are_one_sentence(params: TrainParams, values: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        parse("train", params.model_dump() | values, TrainParams)
