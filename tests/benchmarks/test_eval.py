import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import forwards
from benchmarks.eval import command as bench
from runtime import timing
from runtime.errors import UserError
from tests.world.commands import run

ROOT = Path(__file__).parents[2]
SMALL = ["--subjects", "1", "--pictures", "4", "--seeds", "2", "--repeats", "1", "--set", "run.device=cpu"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict]]:
    monkeypatch.chdir(ROOT)

    def measured(*words: str) -> dict:
        code = run(bench, [*SMALL, *words, "--json", str(tmp_path / "figures.json")])
        figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
        assert code == any(not figure["ok"] for figure in figures)
        return {figure["name"]: figure for figure in figures}

    before = torch.get_num_threads()
    yield measured
    torch.set_num_threads(before)


def test_both_parts_are_measured_over_the_forward_passes_they_make(command, monkeypatch: pytest.MonkeyPatch):
    # By a clock that advances with each forward pass: both ways make the same, in every turn.
    passes = []

    def seconds(work: Callable[[], object]) -> float:
        passes.append(len(forwards.record(work)))
        return float(passes[-1])

    monkeypatch.setattr(timing, "seconds", seconds)
    figures = command("--set", "score.metrics=[clip_t, dino_i, reward]")
    assert list(figures) == ["segment over forward", "score over forward"]
    for figure in figures.values():
        assert figure["value"] == 1 and figure["goal"] == 0.85
        assert "4 images" in figure["detail"]
    turns = 2 * (1 + 1)  # both ways, after one that warms up
    assert [len(set(passes[:turns])), len(set(passes[turns:])), len(passes)] == [1, 1, 2 * turns] and min(passes) > 0


def test_rates_are_of_seconds(command):
    assert all(figure["value"] > 0 for figure in command("score", "--set", "score.metrics=[clip_t]").values())


def test_unknown_part_is_one_sentence():
    with pytest.raises(UserError, match="there is no part 'speed'; choose from segment, score"):
        run(bench, ["speed"])
