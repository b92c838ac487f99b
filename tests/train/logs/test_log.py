from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.world.logs import MEASURES, batch
from train.logs.log import Measures, Record, Windows, standstills
from train.recipe import TrainParams


def quotients(measured: torch.Tensor) -> dict[str, float]:
    return dict(zip(MEASURES.names, (measured[0] / measured[1]).tolist(), strict=True))


def test_buckets_are_named_by_their_first_and_last_timestep():
    assert MEASURES.names[-4:] == ("diffusion_0_249", "diffusion_250_499", "diffusion_500_749", "diffusion_750_999")
    assert Measures(1000, 3).names[-3:] == ("diffusion_0_333", "diffusion_334_666", "diffusion_667_999")


@pytest.mark.parametrize("buckets", [1, 3, 7])
def test_every_timestep_counts_in_the_bucket_that_names_it(buckets: int):
    measures = Measures(1000, buckets)
    losses, _ = batch(sample_diffusion=torch.arange(1000.0))
    measured = measures.of(losses, torch.arange(1000))
    found = dict(zip(measures.names, (measured[0] / measured[1]).tolist(), strict=True))
    for name in measures.names[-buckets:]:
        first, last = map(int, name.split("_")[1:])
        assert found[name] == pytest.approx((first + last) / 2)


def test_bucket_is_the_mean_of_its_samples_over_all_ranks():
    losses, timesteps = batch()
    rows = losses["sample_diffusion"].double()
    ranks = [
        MEASURES.of({**losses, "sample_diffusion": rows[part].float()}, timesteps[part])
        for part in (slice(0, 4), slice(4, 8))
    ]
    found = quotients(torch.stack(ranks).mean(dim=0))
    assert found["diffusion_0_249"] == pytest.approx(float(rows[[0, 1, 6]].mean()), rel=1e-12)
    assert found["diffusion_250_499"] == pytest.approx(float(rows[[2, 5, 7]].mean()), rel=1e-12)
    assert found["diffusion_750_999"] == pytest.approx(float(rows[[3, 4]].mean()), rel=1e-12)
    assert found["cscl"] == pytest.approx(losses["cscl"].item(), rel=1e-12)


def test_window_is_the_mean_over_its_samples_and_what_was_not_measured_is_an_empty_cell(tmp_path: Path):
    windows = Windows(MEASURES.names, every=2)
    parts = [batch(seed=seed, rows=rows) for seed, rows in ((0, 4), (1, 4), (2, 4))]
    for losses, _ in parts:
        del losses["macl_accuracy"]
    for step, (losses, timesteps) in enumerate(parts):
        windows.add(step, MEASURES.of(losses, timesteps).tolist())
    windows.close(2)
    windows.write(tmp_path / "losses.csv")
    with (tmp_path / "losses.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows] == ["2", "3"]
    in_bucket = [float(losses["sample_diffusion"][row]) for losses, _ in parts[:2] for row in (0, 1)]
    assert float(rows[0]["diffusion_0_249"]) == pytest.approx(sum(in_bucket) / 4, rel=1e-5)
    assert float(rows[0]["total"]) == pytest.approx(float(parts[0][0]["total"] + parts[1][0]["total"]) / 2, rel=1e-5)
    assert {name for name, cell in rows[0].items() if not cell} == {"macl_accuracy", "diffusion_500_749"}


def row_values(record: Record, **values: float) -> list[list[float]]:
    """Numerators and denominators of a step; columns that are not named are 0.5."""
    columns = record.training.columns
    return [[values.get(name, 0.5) for name in columns], [1.0] * len(columns)]


def test_record_goes_on_from_its_state_to_the_same_files(params: TrainParams, tmp_path: Path):
    short = params.model_copy(update={"log_every": 3})
    whole, first = Record(short, MEASURES), Record(short, MEASURES)
    for step in range(8):
        if step == 4:
            resumed = Record(short, MEASURES)
            resumed.restore(json.loads(json.dumps(first.state())))
            first = resumed
        for record in (whole, first):
            losses, timesteps = batch(seed=step)
            measured = MEASURES.of(losses, timesteps).tolist()
            record.training.add(step, [[*measured[0], 0.1, 1.0], [*measured[1], 1.0, 1.0]])
            for _ in range(short.validation.batches):
                record.validation.add(step, measured)
    for name, record in (("whole", whole), ("resumed", first)):
        (tmp_path / name).mkdir()
        record.write(tmp_path / name)
    for file in ("losses.csv", "validation.csv"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()
    assert whole.metrics() == first.metrics()
    last = {name: value for name, value in whole.validation.named(-1).items() if name != "step" and value is not None}
    assert whole.metrics()["validation"] == last and "diffusion_500_749" not in last


def logged(params: TrainParams, steps: int = 100, **curves: Any) -> Record:
    """A record of a run of 100 steps whose curves are functions of the share of the run that is over."""
    rule = params.warnings.model_copy(update={"after": 0.25, "windows": 4, "location": 0.01, "accuracy": 0.1})
    record = Record(params.model_copy(update={"steps": 100, "log_every": 1, "warnings": rule}), MEASURES)
    for step in range(steps):
        record.training.add(step, row_values(record, **{name: curve(step / 100) for name, curve in curves.items()}))
    return record


def complaints(params: TrainParams, **curves: Any) -> list[str]:
    """The first words of the warnings after a quarter of a run in which all but `curves` moves."""
    moving = {"location": lambda x: -x, "cscl_accuracy": lambda x: x, "macl_accuracy": lambda x: x}
    record = logged(params, 25, **{**moving, **curves})
    return [sentence.split(" has not moved")[0] for sentence in record.warnings(24)]


def test_what_moves_is_not_warned_of(params: TrainParams):
    assert complaints(params) == []


@pytest.mark.parametrize("name", ["location", "cscl_accuracy", "macl_accuracy"])
def test_what_stands_still_or_moves_the_wrong_way_is_warned_of(params: TrainParams, name: str):
    label = name.replace("_", " ")
    start = -0.01 if name == "location" else 0.3
    away = 1 if name == "location" else -1
    assert complaints(params, **{name: lambda x: start}) == [label]
    assert complaints(params, **{name: lambda x: start + away * 0.2 * x}) == [label]
    # Noise of windows around the same value is no movement.
    assert complaints(params, **{name: lambda x: start + 0.001 * (-1) ** round(100 * x)}) == [label]


def test_moved_means_the_asked_share_of_the_way_from_the_first_windows_to_the_best(params: TrainParams):
    def after(now: float) -> Any:
        return lambda x: 0.2 if x < 0.1 else now

    assert complaints(params, cscl_accuracy=after(0.2 + 0.09 * 0.8)) == ["cscl accuracy"]
    assert complaints(params, cscl_accuracy=after(0.2 + 0.11 * 0.8)) == []
    location = [lambda x, now=now: -0.01 if x < 0.1 else now for now in (-0.0195, -0.0205)]
    assert complaints(params, location=location[0]) == ["location"]
    assert complaints(params, location=location[1]) == []


def test_what_is_learned_within_the_first_windows_need_not_move(params: TrainParams):
    assert complaints(params, cscl_accuracy=lambda x: 0.97, macl_accuracy=lambda x: 1.0) == []


def test_losses_that_are_off_are_not_watched_and_too_few_windows_say_nothing(params: TrainParams):
    off = params.objective.model_copy(update={"location_weight": 0.0})
    flat = {name: lambda x: 0.3 for name in ("cscl_accuracy", "macl_accuracy")}
    record = logged(params.model_copy(update={"objective": off}), 25, location=lambda x: 0.0, **flat)
    assert len(record.warnings(24)) == 2
    for row in record.training.rows:
        row[1 + record.training.columns.index("cscl_accuracy")] = None
    assert [sentence[:4] for sentence in record.warnings(24)] == ["macl"]
    assert list(standstills(logged(params, 7).training, logged(params).params)) == []


def test_warnings_are_given_at_one_window_however_often_a_run_is_resumed(params: TrainParams):
    flat = {"location": lambda x: 0.0}
    given = [step for step in range(100) if logged(params, step + 1, **flat).warnings(step)]
    assert given == [24]


def test_toyboxs_own_location_loss_does_not_move_and_its_accuracies_do(params: TrainParams):
    """Means of four windows of ten steps of a run of the default params, at steps 40 and 200."""
    location = [-0.0100, -0.0101]
    cscl, macl = [0.655, 0.95], [0.721, 0.85]
    curves = {
        name: lambda x, values=values: values[x > 0.1]
        for name, values in (("location", location), ("cscl_accuracy", cscl), ("macl_accuracy", macl))
    }
    assert complaints(params, **curves) == ["location"]


def test_table_sets_the_last_window_and_the_validation_beside_the_first(params: TrainParams):
    record = logged(params, 12, total=lambda x: 1 - x)
    losses, timesteps = batch(total=torch.tensor(0.75))
    for _ in range(params.validation.batches):
        record.validation.add(11, MEASURES.of(losses, timesteps).tolist())
    lines = record.table()
    assert lines[0].split() == ["first", "last", "validation"]
    assert [line.split() for line in lines if line.startswith("total")] == [["total", "1", "0.89", "0.75"]]
