"""One command runs the data stages on a folder of photos, and says what is wrong before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines import run
from runtime.errors import UserError


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The stage commands that would have been started."""
    started: list[list[str]] = []

    def start(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run.subprocess, "run", start)
    return started


def test_stages_run_in_order_on_the_named_folder(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = tmp_path / "tables"
    words = ["--layout", "folder", "--root", str(tmp_path), "--data", str(data), "--set", "mask.method=grounded_sam"]
    monkeypatch.setattr(sys, "argv", ["run", *words])
    run.main()
    assert [command[2] for command in commands] == [f"pipelines.{stage}" for stage in run.STAGES]
    for command in commands:
        assert command[command.index("--data") + 1] == str(data)
        assert "mask.method=grounded_sam" in command
        overlay = yaml.safe_load(Path(command[command.index("--params") + 1]).read_text())
        assert overlay == {"sources": [{"name": "folder", "layout": "folder", "root": str(tmp_path), "split": "train"}]}


def test_missing_folder_and_the_pipelines_own_tables_are_refused(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    gone = tmp_path / "gone"
    monkeypatch.setattr(sys, "argv", ["run", "--layout", "folder", "--root", str(gone), "--data", str(tmp_path / "d")])
    with pytest.raises(UserError, match=f"folder '{gone}' does not exist"):
        run.main()
    monkeypatch.setattr(sys, "argv", ["run", "--layout", "folder", "--root", str(tmp_path)])
    with pytest.raises(UserError, match="name another folder"):
        run.main()
    assert commands == []
