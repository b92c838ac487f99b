from __future__ import annotations

import ctypes
import importlib
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.cli import read_params
from runtime.errors import UserError
from runtime.lock import exclusive
from tests.world.training import tiny_params
from train import launch, run
from train.distributed import ranks
from train.distributed.resume import ResumeOptions
from train.recipe import TrainParams


def test_ranks_on_the_cpu_are_as_many_as_asked_for(params: TrainParams):
    assert launch.devices(params, "cpu") == ["0", "1"]


def test_ranks_on_gpus_are_at_most_one_each_and_divide_the_batch(params: TrainParams, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch.devices(params, "cuda") == ["0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert launch.devices(params, "cuda") == ["4", "6"]
    assert launch.devices(params.model_copy(update={"ranks": 3}), "cuda") == ["4", "6"]


def test_no_gpu_is_one_sentence(params: TrainParams, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="no GPU is visible"):
        launch.devices(params, "cuda")


def test_batch_that_ranks_do_not_divide_is_refused(params: TrainParams):
    with pytest.raises(UserError, match=r"train\.batch = 8 does not divide evenly into 3 ranks"):
        launch.devices(params.model_copy(update={"ranks": 3}), "cpu")


def test_ranks_listen_on_loopback_only():
    found = launch.environment("cpu", 1)
    assert found["GLOO_SOCKET_IFNAME"] == found["NCCL_SOCKET_IFNAME"]
    assert found["GLOO_SOCKET_IFNAME"].startswith("lo")


def test_second_run_is_told_who_holds_the_stage(tmp_path: Path):
    with exclusive("train", tmp_path), pytest.raises(UserError, match=r"already being run by process \d+ on"):
        with exclusive("train", tmp_path):
            pass


def test_rank_whose_launcher_is_gone_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *words: 0))
    ranks.die_with_parent()  # of another launcher
    monkeypatch.setenv(ranks.LAUNCHER, str(os.getppid()))
    ranks.die_with_parent()
    monkeypatch.setenv(ranks.LAUNCHER, str(os.getpid()))
    with pytest.raises(SystemExit) as stop:
        ranks.die_with_parent()
    assert stop.value.code == 1


def test_ranks_are_told_their_launcher(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ranks.LAUNCHER, "")  # so that it is taken back
    monkeypatch.setattr("deepspeed.launcher.launch.main", lambda: None)
    assert launch.start("train.run", ["0"], []) == 0
    assert os.environ[ranks.LAUNCHER] == str(os.getpid())


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The call of `launch.start`: its exit code, which the test sets, then module, devices and options."""
    found: list[Any] = []

    def start(*call: Any) -> int:
        found.extend(call)
        return found[0]

    monkeypatch.setattr(launch, "start", start)
    monkeypatch.setattr(launch, "memory_line", lambda *known: "1 MB")
    for name, value in launch.environment("cpu", 1).items():
        monkeypatch.setenv(name, value)  # so that it is restored
    return found


def test_ranks_are_given_the_options_of_the_command_and_end_it_with_their_code(
    started: list[Any], variant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    started.append(3)
    asked = tiny_params(tmp_path, variant, tmp_path / "tables", ranks=2)
    with pytest.raises(SystemExit) as ended:
        launch.main(asked, resume="~/run", other_ranks=True)
    code, module, ids, words = started
    assert ended.value.code == code and (module, ids) == ("train.run", ["0", "1"])
    options = run.command_line().parse_args([*words, "--local_rank=1"])  # which DeepSpeed's own launcher adds
    given = read_params(options)
    assert (given.tree(), given.data) == (asked.tree(), asked.data)
    resumed = ResumeOptions.of(options.resume, options.other_ranks)
    assert resumed == ResumeOptions(Path("~/run").expanduser(), other_ranks=True)
    assert "2 ranks on cpu, ZeRO-2" in capsys.readouterr().out


def test_killed_rank_is_told_with_its_signal(started: list[Any], variant: Path, tmp_path: Path):
    started.append(-9)
    with pytest.raises(UserError, match="killed by signal 9; the same command resumes"):
        launch.main(tiny_params(tmp_path, variant, tmp_path / "tables", ranks=2))


def test_first_rank_of_another_launcher_holds_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = (SimpleNamespace(rank=rank) for rank in range(2))
    with run.lock(first, tmp_path):  # type: ignore[arg-type]
        with run.lock(second, tmp_path):  # type: ignore[arg-type]
            pass
        with pytest.raises(UserError, match="stage train is already being run"), run.lock(first, tmp_path):  # type: ignore[arg-type]
            pass
        monkeypatch.setenv(ranks.LAUNCHER, "1")
        with run.lock(first, tmp_path):  # type: ignore[arg-type]
            pass


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_collectives_wait_as_long_as_the_store(kind: str, monkeypatch: pytest.MonkeyPatch):
    told: list[dict[str, Any]] = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(ranks, "meet", lambda rank, world: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: told.append(options))
    monkeypatch.setattr("deepspeed.init_distributed", lambda **options: None)
    # Otherwise DeepSpeed runs a compiler to probe its operators.
    monkeypatch.setitem(vars(importlib.import_module("deepspeed.ops")), "__compatible_ops__", {})
    ranks.Ranks.join(kind)
    assert [options["timeout"] for options in told] == [ranks.PATIENCE]


def test_interrupt_is_noticed_although_another_handler_takes_it():
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        with launch.received_signals() as received:
            assert received() == b""
            signal.raise_signal(signal.SIGINT)
            assert signal.SIGINT in received()
    finally:
        signal.signal(signal.SIGINT, before)
