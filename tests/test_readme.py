"""README.md: its Python and commands run in a fresh folder; parsers read those that cannot be run here."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipelines.toybox import layouts
from pipelines.toybox.world import render
from runtime import cli
from runtime.closure import ROOT
from runtime.stages import stages

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?P<mark><!-- not run: [a-z ]+ -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)
BLOCKS = [match.groupdict() for match in BLOCK.finditer(TEXT)]
COMMANDS = [
    (line.partition("  #")[0].strip(), block["mark"] is None)
    for block in BLOCKS
    if block["language"] == "sh"
    for line in block["text"].splitlines()
]
LINKS = re.findall(r"\]\((?!https?:)([^)#]+)", TEXT)
SEEN = ("make", "customcontrast", "dvc")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what a clone has, and a home with photos of two toys."""
    for name in ("params.yaml", "weights", "docs", "configs", "Makefile", "dvc.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("target", LINKS)
def test_linked_file_exists(target: str):
    assert (ROOT / target).exists()


def test_every_block_is_known_to_this_test():
    assert {block["language"] for block in BLOCKS} == {"sh", "python", "", "bibtex"}
    assert {command.split()[0] for command, _ in COMMANDS if "=" not in command.split()[0]} <= set(SEEN)
    assert sum(run for _, run in COMMANDS) >= 4


def test_python_runs(fresh: Path):
    (code,) = [block["text"] for block in BLOCKS if block["language"] == "python"]
    exec(compile(code, "README.md", "exec"), {})
    with Image.open(fresh / "mug.png") as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize("command", [command for command, _ in COMMANDS])
def test_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch):
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "customcontrast":
        name, *rest = words[1:]
        if name in stages():
            cli.stage_parser(stages()[name]).parse_args(rest)
        else:
            parser = cli.Parser()
            module(name).arguments(parser)
            assert isinstance(parser.parse_args(rest), argparse.Namespace)
    else:
        assert words == ["dvc", "repro"]


def module(name: str):
    """The module of a command that is not a stage."""
    import importlib

    return importlib.import_module(cli.COMMANDS[name].module)


@pytest.mark.slow
def test_commands_run_one_after_the_other(fresh: Path):
    for name, items in layouts.people(seed=0, subjects=2, photos=4).items():
        folder = fresh / "home" / "photos" / items[0][0].family / name
        folder.mkdir(parents=True)
        for number, image in enumerate(render(items).images.numpy()):
            Image.fromarray(image).save(folder / f"{number}.jpg", quality=95)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    said = []
    for command in (command for command, run in COMMANDS if run and command.startswith("customcontrast")):
        runnable = command.replace("customcontrast", f"{sys.executable} {ROOT / 'customcontrast.py'}", 1)
        done = subprocess.run(runnable, shell=True, cwd=fresh, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout.splitlines()[-1])
    assert said[0] == "mug.png"
    assert said[1].startswith("tables: data/photos")
    assert (fresh / "data" / "pairs" / "README.md").is_file()
