"""One command runs the data stages on a folder of photos, and says what is wrong before anything starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from pipelines import run
from runtime.cli import Parser
from runtime.closure import ROOT
from runtime.errors import UserError
from runtime.params import parse_yaml
from runtime.stages import stages


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The stage commands that would have been started."""
    started: list[list[str]] = []

    def start(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run.subprocess, "run", start)
    monkeypatch.chdir(ROOT)
    return started


def data(*words: str) -> int:
    """Run the command `customcontrast data`."""
    parser = Parser()
    run.arguments(parser)
    return run.main(parser.parse_args(words))


def test_stages_run_in_order_on_the_named_folder(commands: list[list[str]], tmp_path: Path):
    tables = tmp_path / "tables"
    words = ["--layout", "folder", "--root", str(tmp_path), "--data", str(tables), "--set", "mask.method=grounded_sam"]
    assert data(*words) == 0
    assert [command[2] for command in commands] == [f"pipelines.{stage}" for stage in run.STAGES]
    assert [stage.module for name, stage in stages().items() if name in run.STAGES] == [
        f"pipelines.{stage}.stage" for stage in run.STAGES
    ]
    for command in commands:
        assert command[command.index("--data") + 1] == str(tables)
        assert "mask.method=grounded_sam" in command
        overlay = yaml.safe_load(Path(command[command.index("--params") + 1]).read_text())
        assert overlay == {"sources": [{"name": "folder", "layout": "folder", "root": str(tmp_path), "split": "train"}]}


@pytest.mark.parametrize("name", ["1e5", "0o17", "yes", "null", "007"])
def test_name_that_looks_like_a_number_stays_a_name(commands: list[list[str]], tmp_path: Path, name: str):
    data("--layout", "folder", "--root", str(tmp_path), "--data", str(tmp_path / "d"), "--name", name)
    assert parse_yaml((tmp_path / "d/sources.yaml").read_text())["sources"][0]["name"] == name


def test_photos_for_a_test_make_no_training_pairs(commands: list[list[str]], tmp_path: Path):
    assert data("--layout", "folder", "--root", str(tmp_path), "--data", str(tmp_path / "d"), "--split", "test") == 0
    assert [command[2] for command in commands] == [f"pipelines.{stage}" for stage in ("curate", "mask", "similarity")]


def test_stage_that_fails_ends_the_command_with_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    codes = iter((0, 3))
    monkeypatch.setattr(run.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, next(codes)))
    monkeypatch.chdir(ROOT)
    assert data("--layout", "folder", "--root", str(tmp_path), "--data", str(tmp_path / "d")) == 3


def test_missing_folder_and_the_pipelines_own_tables_are_refused(commands: list[list[str]], tmp_path: Path):
    gone = tmp_path / "gone"
    with pytest.raises(UserError, match=f"folder '{gone}' does not exist"):
        data("--layout", "folder", "--root", str(gone), "--data", str(tmp_path / "d"))
    with pytest.raises(UserError, match="name another folder"):
        data("--layout", "folder", "--root", str(tmp_path))
    with pytest.raises(UserError, match="--name 'my photos' cannot begin an id; give letters, digits"):
        data("--layout", "folder", "--root", str(tmp_path), "--data", str(tmp_path / "d"), "--name", "my photos")
    assert commands == []


def test_licence_of_the_photos_is_passed_on(commands: list[list[str]], tmp_path: Path):
    words = ["--licence", "CC BY 4.0", "--attribution", "Ann"]
    data("--layout", "folder", "--root", str(tmp_path), "--data", str(tmp_path / "d"), *words)
    (source,) = parse_yaml((tmp_path / "d/sources.yaml").read_text())["sources"]
    assert (source["licence"], source["attribution"]) == ("CC BY 4.0", "Ann")
