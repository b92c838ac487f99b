"""Training under every ZeRO stage: losses, checkpoints and outputs."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.adapter import Adapter
from runtime.errors import UserError
from runtime.params import parse
from tests.world.ranks import gather_everything, repeat_the_first_batch, run_ranks, trace_the_unet
from tests.world.training import write_options, write_world
from train.distributed.engine import part_of
from train.recipe import TrainParams

OUTS = ("adapter/adapter.safetensors", "adapter/adapter.json", "adapter/card.json", "losses.csv", "metrics.json")
# So often that ranks differ in how many of their samples have a location loss.
DROP = {"image": 0.2, "text": 0.2, "both": 0.1}
# A checkpoint after each step. Three ranks divide the batch, but few of the weights.
SHORT = {"steps": 2, "checkpoint_every": 1, "batch": 6, "drop": DROP, "ema": 0.9}
# (ZeRO stage, precision, ranks): each stores weights and moments in a different way. Stage 2 in fp32, the default, is
# stopped and resumed in test_run.py.
CORNERS = [(0, "fp32", 2), (0, "bf16", 2), (1, "fp32", 2), (2, "bf16", 2), (3, "bf16", 2), (3, "fp32", 3)]


@dataclass(frozen=True)
class Trained:
    """A run in a folder of its own."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "data" / "train"

    @property
    def said(self) -> str:
        return (self.folder / "output").read_text()

    @property
    def rows(self) -> list[dict[str, float]]:
        """The losses, without empty cells."""
        with (self.out / "losses.csv").open() as stream:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]

    @property
    def content(self) -> dict[str, bytes]:
        return {name: (self.out / name).read_bytes() for name in OUTS}

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "work" / "train").glob("*/step-*"))


Run = Callable[..., Trained]


@pytest.fixture(scope="module")
def run(variant: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train with these values of the train section; tests that ask for the same values share one run."""
    world = write_world(tmp_path_factory.mktemp("world") / "data", views=10, single=2)
    done: dict[str, Trained] = {}

    def trained(before: Callable[[int], None] | None = None, ranks: int = 2, **train: Any) -> Trained:
        values = SHORT | {"ranks": ranks} | train
        key = f"{before and before.__name__} {json.dumps(values, sort_keys=True)}"
        if key not in done:
            folder = tmp_path_factory.mktemp("run")
            shutil.copytree(world.data, folder / "data")
            start(folder, variant, values, before)
            done[key] = Trained(folder)
        return done[key]

    return trained


def start(folder: Path, variant: Path, values: dict[str, Any], before: Callable[[int], None] | None) -> None:
    words = write_options(folder, variant, folder / "data", **values)
    codes = run_ranks(values["ranks"], words, folder / "output", before)
    assert codes == [0] * values["ranks"], (folder / "output").read_text()


def sharding(stage: int) -> Callable[[int], None] | None:
    """ZeRO 3 shards each weight, those of the frozen UNet and text encoder among them."""
    return gather_everything if stage == 3 else None


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    "stage,ranks,settings",
    [
        (0, 2, {}),
        (1, 2, {}),
        (2, 2, {"offload": "optimizer", "ema": None}),
        (3, 3, {}),
        (3, 2, {"offload": "all", "gradient_checkpointing": "all", "ema": None}),
    ],
)
def test_all_stages_compute_the_same(stage: int, ranks: int, settings: dict[str, Any], run: Run):
    wanted = run(ranks=1).rows
    found = run(sharding(stage), ranks, zero_stage=stage, precision="fp32", **settings)
    for row, other in zip(found.rows, wanted, strict=True):
        assert row == pytest.approx(other, rel=2e-4)


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("stage,precision,ranks", CORNERS)
def test_stopped_half_way_and_resumed_is_the_same_bytes(
    stage: int, precision: str, ranks: int, run: Run, variant: Path, tmp_path: Path
):
    values = {"zero_stage": stage, "precision": precision}
    whole = run(sharding(stage), ranks, **values)
    stopped = Trained(Path(shutil.copytree(whole.folder, tmp_path / "stopped")))
    shutil.rmtree(stopped.checkpoints[-1])
    shutil.rmtree(stopped.out)
    start(stopped.folder, variant, SHORT | {"ranks": ranks} | values, sharding(stage))
    assert "resuming at step 1 of 2" in stopped.said.removeprefix(whole.said)
    assert stopped.content == whole.content


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("stage,precision,ranks", CORNERS)
def test_ema_is_the_formula_and_the_adapter_that_is_used(stage: int, precision: str, ranks: int, run: Run):
    found = run(sharding(stage), ranks, zero_stage=stage, precision=precision)
    first, second = (load_file(folder / "state.safetensors") for folder in found.checkpoints)
    decay = min(0.9, (1 + 2) / (10 + 2))
    adapter = found.out / "adapter"
    averaged, raw = (load_file(adapter / place / "adapter.safetensors") for place in ("", "raw"))
    names = [name for name, _ in Adapter.load(adapter).named_parameters()]
    for name in names:
        weights, average = second[f"weight/{name}"], second[f"ema/{name}"]
        torch.testing.assert_close(average, decay * first[f"ema/{name}"] + (1 - decay) * weights)
        assert torch.equal(raw[name], weights.to(raw[name].dtype))
        assert torch.equal(averaged[name], average.to(raw[name].dtype))
    assert any(not torch.equal(raw[name], averaged[name]) for name in names)


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_outs_of_a_sharded_run_hold_the_adapter_alone_and_tell_what_it_is_of(run: Run):
    found = run(gather_everything, zero_stage=3, precision="bf16")
    adapter = Adapter.load(found.out / "adapter")
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    for file in (found.out / "adapter").rglob("adapter.safetensors"):
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        size = sum(t.numel() * t.element_size() for t in (*adapter.parameters(), *adapter.buffers()))
        assert file.stat().st_size == header + size

    names = {name for name, _ in adapter.named_parameters()}
    kinds = ("weight", "exp_avg", "exp_avg_sq", "ema")
    assert set(load_file(found.checkpoints[-1] / "state.safetensors")) == {f"{k}/{n}" for k in kinds for n in names}

    card = json.loads((found.out / "adapter" / "card.json").read_text())
    metrics = json.loads((found.out / "metrics.json").read_text())
    assert card["recipe"]["data"] == adapter.data_hash
    assert card["recipe"]["base"]["model"] == adapter.config.base_model
    assert card["recipe"]["base"]["revision"] == adapter.config.base_revision
    assert card["recipe"]["train"]["precision"] == "bf16"
    assert card["losses"] == {name: metrics[name] for name in card["losses"]} and "total" in card["losses"]
    assert {of["licence"] for of in card["photos"]} == {"unknown"} and card["photos"][0]["photos"] > 0
    assert card["commit"] is None or len(card["commit"]) == 40
    assert str(found.folder) not in (found.out / "adapter" / "card.json").read_text()


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_accumulated_step_is_the_mean_of_its_micro_steps(run: Run):
    wanted, found = (run(repeat_the_first_batch, batch=4, accumulation=count).rows for count in (1, 2))
    for row, other in zip(found, wanted, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_compiled_unet_computes_the_same(run: Run):
    """The second step's losses depend on the gradients of the first."""
    wanted = run(ranks=1).rows
    for row, other in zip(run(trace_the_unet, ranks=1, compile=True).rows, wanted, strict=True):
        assert row == pytest.approx(other, rel=2e-4)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_parts_of_a_tensor_are_all_of_it_and_zeros(ranks: int):
    value = torch.arange(1.0, 6.0).reshape(5, 1)
    size = math.ceil(5 / ranks)
    parts = torch.stack([part_of(value, size, rank) for rank in range(ranks)]).flatten()
    assert torch.equal(parts[:5], value.flatten()) and not parts[5:].any()


def test_micro_steps_draw_batches_of_their_own(params: TrainParams):
    assert [list(params.model_copy(update={"accumulation": 3}).draws(step)) for step in (0, 1)] == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    assert params.model_copy(update={"accumulation": 3}).samples == 24


@pytest.mark.parametrize(
    "values,said",
    [
        ({"zero_stage": 2, "offload": "all"}, "offload all needs zero_stage 3, not 2"),
        ({"zero_stage": 0, "offload": "optimizer"}, "offload optimizer needs zero_stage 1, 2 or 3"),
        ({"zero_stage": 3, "compile": True}, "compile does not work with zero_stage 3"),
        ({"zero_stage": 0, "precision": "fp16"}, "precision fp16 needs zero_stage 1, 2 or 3"),
    ],
)
def test_settings_that_do_not_go_together_are_one_sentence(params: TrainParams, values: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        parse("train", params.model_dump() | values, TrainParams)
