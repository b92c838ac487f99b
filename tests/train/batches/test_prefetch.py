"""Batches read ahead by threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.objective import TrainingBatch
from runtime.errors import UserError
from tests.world.batches import read, sampler
from tests.world.training import write_world
from train.batches.prefetch import Batches
from train.batches.sampler import Sampler

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def draws(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    return sampler(read(write_world(tmp_path_factory.mktemp("prefetch") / "data", group_size=12).data))


def equal(a: TrainingBatch, b: TrainingBatch) -> bool:
    pairs = [(value, getattr(b, name)) for name, value in vars(a).items()]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_read_ahead_are_bit_for_bit_those_of_the_sampler(draws: Sampler, ahead: int):
    with Batches(draws, 1, 2, CPU, ahead=ahead, steps=20) as batches:
        for step in [*range(4, 20), 7]:  # over the end of an epoch, and back
            assert equal(batches.take(step), draws.batch(step, 1, 2)), step


def test_coming_batches_are_read_while_a_step_computes_and_none_beyond_the_last(
    draws: Sampler, monkeypatch: pytest.MonkeyPatch
):
    gates = [threading.Event() for _ in range(5)]
    begun: list[int] = []
    done: list[int] = []

    def held(step: int, *_: Any) -> TrainingBatch:
        begun.append(step)
        assert gates[step].wait(60)
        batch = Sampler.read(draws, step)
        done.append(step)
        return batch

    monkeypatch.setattr(draws, "read", held)
    with Batches(draws, 0, 1, CPU, ahead=2, steps=5) as batches:
        gates[0].set()
        batches.take(0)
        until(lambda: sorted(begun) == [0, 1, 2])
        gates[1].set()
        until(lambda: 1 in done)  # the step
        batches.take(1)  # waits neither for the second, which is being read, nor for the third, which is begun
        assert sorted(done) == [0, 1]
        for gate in gates:
            gate.set()
        for step in (2, 3, 4):
            batches.take(step)
    assert sorted(begun) == [0, 1, 2, 3, 4]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("ahead", [0, 2])
def test_seconds_waited_are_added_up(ahead: int, draws: Sampler, monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 15.0, 20.0, 20.5])
    monkeypatch.setattr("train.batches.prefetch.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with Batches(draws, 0, 1, CPU, ahead=ahead, steps=5) as batches:
        batches.take(0)
        batches.take(1)
        assert batches.waited == 5.5


def test_error_of_a_thread_is_raised_in_its_step_as_it_is(draws: Sampler, monkeypatch: pytest.MonkeyPatch):
    def broken(step: int, *_: Any) -> TrainingBatch:
        if step == 2:
            raise UserError("photo 7 cannot be read")
        return Sampler.read(draws, step)

    monkeypatch.setattr(draws, "read", broken)
    with Batches(draws, 0, 1, CPU, ahead=2, steps=9) as batches:
        batches.take(0)
        batches.take(1)
        with pytest.raises(UserError, match="photo 7 cannot be read"):
            batches.take(2)


def test_closed_batches_leave_no_thread(draws: Sampler):
    with pytest.raises(KeyError), Batches(draws, 0, 1, CPU, ahead=3, steps=20) as batches:
        batches.take(0)
        raise KeyError
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("batch")]
