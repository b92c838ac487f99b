from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.errors import UserError
from tests.world.logs import MEASURES, batch
from train.logs.log import Record
from train.logs.progress import LOG, TrainingProgress
from train.recipe import TrainParams

CPU = torch.device("cpu")


def progress(params: TrainParams, folder: Path, start: int = 0, **changes: Any) -> TrainingProgress:
    record = Record(params.model_copy(update={"steps": 6, "log_every": 2, **changes}), MEASURES)
    return TrainingProgress(record, start, folder, CPU, every=0)


def go(told: TrainingProgress, steps: int, validated: int | None = None) -> None:
    for step in range(told.step, told.step + steps):
        losses, timesteps = batch(seed=step)
        measured = MEASURES.of(losses, timesteps).tolist()
        told.record.training.add(step, [[*measured[0], 0.1, 1.0], [*measured[1], 1.0, 1.0]])
        if step + 1 == validated:
            for _ in range(told.params.validation.batches):
                told.record.validation.add(step, measured)
        told.advance()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_log_holds_a_line_a_window_with_all_columns_speed_and_memory(params: TrainParams, tmp_path: Path):
    told = progress(params, tmp_path)
    go(told, 4, validated=4)
    windows = [line for line in lines(tmp_path) if "total" in line]
    assert [line["step"] for line in windows] == [2, 4]
    for line, row in zip(windows, (0, 1), strict=True):
        assert line.items() >= told.record.training.named(row).items()
        assert line["samples_per_second"] > 0 and line["peak_memory"] > 2**20
    assert windows[0]["diffusion_500_749"] is None
    (validation,) = [line for line in lines(tmp_path) if "validation" in line]
    assert validation["step"] == 4 and "total" in validation["validation"]


def test_start_after_a_kill_cuts_off_the_broken_line_and_what_comes_again(params: TrainParams, tmp_path: Path):
    go(progress(params, tmp_path), 4)
    with (tmp_path / LOG).open("a") as stream:
        stream.write('{"step": 2, "tot')
    told = progress(params, tmp_path, start=2)
    go(told, 4)
    told.close()
    assert [line["step"] for line in lines(tmp_path) if "total" in line] == [2, 4, 6]
    assert lines(tmp_path)[-1]["seconds"] >= 0


def test_lines_say_total_accuracies_speed_and_time_left(
    params: TrainParams, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    told = progress(params, tmp_path)
    go(told, 1)
    total = told.record.training.latest()["total"]
    said = capsys.readouterr().out
    assert said.startswith(f"train: step 1 of 6, total {total:.4f} cscl ")
    assert "% macl " in said and "samples/s, 0.0% of the time waiting for data, 00:00 left" in said
    go(told, 5)
    told.close()
    assert "\ntotal " in capsys.readouterr().out.partition("waiting for data\n")[2]


def test_bar_on_a_terminal_says_the_same_and_lets_warnings_through(
    params: TrainParams, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(Record, "warnings", lambda self, step: ["it stands"] if step == 0 else [])
    told = progress(params, tmp_path)
    go(told, 1)
    assert told.bar is not None and told.bar.n == 1 and told.bar.total == 6
    for word in ("total=", "cscl=", "macl=", "samples/s="):
        assert word in told.bar.postfix
    told.bar.close()
    found = capsys.readouterr()
    assert "warning: it stands" in found.err and found.out == ""


def test_warning_is_printed_and_logged_once(
    params: TrainParams, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    told = progress(params, tmp_path)
    monkeypatch.setattr(Record, "warnings", lambda self, step: ["it stands"] if step == 3 else [])
    go(told, 6)
    assert capsys.readouterr().out.count("train: warning: it stands\n") == 1
    assert [line["step"] for line in lines(tmp_path) if "warning" in line] == [4]


def test_tensorboard_holds_every_window_once_after_a_kill(params: TrainParams, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = progress(params, tmp_path, tensorboard=True)
    go(killed, 4, validated=4)
    killed.board.close()
    told = progress(params, tmp_path, start=2, tensorboard=True)
    go(told, 4)
    told.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [2, 4, 6]
    tags = set(events.Tags()["scalars"])
    assert {"timesteps/diffusion_0_249", "accuracy/cscl_accuracy", "update/gradient_norm"} <= tags
    assert {"speed/peak_memory", "speed/samples_per_second"} <= tags
    assert "timesteps/diffusion_500_749" not in tags


def test_missing_tensorboard_is_one_sentence(params: TrainParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name: str, *others: Any) -> Any:
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="install the extra `tensorboard`"):
        progress(params, tmp_path, tensorboard=True)
