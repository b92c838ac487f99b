"""The trainings run in an order in which each finds what it needs."""

import threading
import time

import pytest

from train.toybox import all as everything


@pytest.mark.parametrize("world", everything.STEPS)
@pytest.mark.parametrize("together", [1, 2, 4])
def test_every_step_runs_once_after_what_it_needs(monkeypatch, together, world):
    ended, running, most, given = list[str](), set[str](), [0], dict[str, int]()
    lock = threading.Lock()

    def run(of: str, name: str, threads: int) -> int:
        assert of == world
        with lock:
            assert set(everything.STEPS[world][name].needs) <= set(ended), name
            running.add(name)
            given[name] = threads
            most[0] = max(most[0], len(running))
        time.sleep(0.01)
        with lock:
            running.remove(name)
            ended.append(name)
        return 0

    monkeypatch.setattr(everything, "run", run)
    assert everything.run_all(world, list(everything.STEPS[world]), together, 1) == 0
    assert sorted(ended) == sorted(everything.STEPS[world])
    assert most[0] == together
    # Nothing can run beside the first and the last; the longest starts beside others.
    assert given["data"] == given["check"] == together and given["text_to_image"] == 1


def test_a_step_that_fails_ends_the_run_with_its_code_and_chosen_steps_run_alone(monkeypatch):
    ran = []

    def run(world: str, name: str, threads: int) -> int:
        ran.append(name)
        return 3 if name == "vae" else 0

    monkeypatch.setattr(everything, "run", run)
    assert everything.run_all("toys", ["clip"], 2, 1) == 0
    assert everything.run_all("toys", list(everything.STEPS["toys"]), 1, 1) == 3
    assert ran == ["clip", "data", "vae"]
