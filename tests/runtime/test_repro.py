"""Where `make repro` stands, and what it says at the end."""

from __future__ import annotations

import pytest

from runtime import repro
from runtime.stages import stages


def test_every_stage_has_its_time_in_order():
    assert list(repro.SECONDS) == list(stages())


def test_bar_goes_by_time_and_the_time_left_by_the_pace_so_far(monkeypatch):
    monkeypatch.setattr(repro, "SECONDS", {"toybox": 60, "curate": 60, "mask": 120})
    first = {"stage": "toybox", "time": 1000.0}
    assert repro.standing([first]) == f"[{' ' * 24}] 1 of 3: toybox"
    slow = [first, {"stage": "mask", "time": 1120.0}]  # curate was skipped, toybox took twice its time
    assert repro.standing(slow) == f"[{'=' * 12}{' ' * 12}] 3 of 3: mask; 2:00 so far, about 4 min left"


def test_summary_has_a_line_for_each_stage_that_ran():
    began = [{"stage": "toybox", "time": 10.0}, {"stage": "mask", "time": 75.0}]
    assert "up to date" in repro.summary([], 8.0, 9.0)
    lines = repro.summary(began, 8.0, 85.0).splitlines()
    assert [line.split() for line in lines] == [
        ["stage", "time"],
        ["toybox", "1:05"],
        ["mask", "0:10"],
        ["all", "1:17"],
    ]


def test_stage_says_where_the_whole_stands_only_within_repro(tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    repro.stage_begins("mask")
    assert capsys.readouterr().out == ""
    monkeypatch.setenv(repro.RECORD, str(tmp_path / "repro.jsonl"))
    repro.stage_begins("mask")
    repro.stage_begins("pairs")
    assert [line.split(": ")[1].split(",")[0].split(";")[0] for line in capsys.readouterr().out.splitlines()] == [
        "mask",
        "pairs",
    ]
    assert [row["stage"] for row in repro.read(tmp_path / "repro.jsonl")] == ["mask", "pairs"]
