"""The trainer's benchmark on tables of the toybox's shapes: every part runs, and memory is what was told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.train import command
from runtime.errors import UserError
from tests.world import training as tiny_world
from tests.world.commands import run
from tests.world.ranks import run_command


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_parts_print_their_goals_and_memory_is_within_15_percent_of_what_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {"SIDE": 16, "LAYERS": 3, "TOKENS": 65, "WIDTH": 128}.items():
        monkeypatch.setattr(tiny_world, name, value)
    world = tiny_world.write_world(tmp_path / "data")
    words = ["--data", str(world.data), "--set", "run.device=cpu", "--set", "run.threads=1", "--work", str(tmp_path)]
    code = run_command(["bench", "train", "loop", "memory", "checkpoint", "--tiny", *words], tmp_path / "output")
    said = (tmp_path / "output").read_text()
    figures = {row["name"]: row for row in json.loads((tmp_path / "figures.json").read_text())["figures"]}
    assert {name: row["goal"] for name, row in figures.items()} == {
        "trainer over bare step": 0.95,
        "share of waiting for data": 0.05,
        "memory, measured and told": 1.15,
        "share of saving": 0.05,
        "seconds to restore": None,
        "checkpoint over its numbers": 1.05,
    }
    assert code == (0 if all(row["ok"] for row in figures.values()) else 1), said
    assert figures["memory, measured and told"]["ok"], figures["memory, measured and told"]["detail"]
    assert figures["checkpoint over its numbers"]["ok"]
    assert 0 < figures["trainer over bare step"]["value"] < 3
    assert all(name in said for name in figures)


@pytest.mark.parametrize(
    ("words", "message"), [(["lop"], "no part 'lop'; choose from loop"), (["--repeats", "0"], "--repeats is 0")]
)
def test_bad_options_are_one_sentence(words: list[str], message: str):
    with pytest.raises(UserError, match=message):
        run(command, words)
