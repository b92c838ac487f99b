"""A changed line of code recomputes the rows that depend on it, and no others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines import tables
from runtime import closure
from runtime.closure import ROOMS, ROOT
from runtime.stages import stages
from tests.world.photos import blocks

STAGES = {name: stage for name, stage in stages().items() if name in ("curate", "mask", "similarity", "encode")}
"""The stages that reuse finished shards; `pairs` recomputes all its rows in every run."""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the code that the stages' code digests are computed from during the test."""
    copy_code(tmp_path / "checkout")
    monkeypatch.setattr(closure, "ROOT", tmp_path / "checkout")
    closure.imports.cache_clear()
    yield tmp_path / "checkout"
    closure.imports.cache_clear()


def copy_code(folder: Path) -> None:
    """Copy all rooms."""
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))


def append(file: Path, line: str) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(f"\n\n{line}\n")
    closure.imports.cache_clear()


def codes() -> dict[str, str]:
    return {name: stage.code() for name, stage in STAGES.items()}


def affected(file: Path) -> set[str]:
    """The stages whose code digest changes with a line of `file`."""
    before = codes()
    append(file, "LIMIT = 1")
    after = codes()
    return {name for name in STAGES if before[name] != after[name]}


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("model/images/decode.py", "curate mask similarity encode"),
        ("pipelines/photos/decode.py", "curate mask similarity encode"),
        ("pipelines/tables/codecs.py", "curate mask similarity encode"),
        ("pipelines/photos/segments.py", "similarity encode"),
        ("pipelines/curate/filters.py", "curate"),
        ("pipelines/curate/captioner.py", "curate"),  # imported inside a function
        ("pipelines/sources/colmap.py", "curate"),
        ("pipelines/mask/quality.py", "mask"),
        ("pipelines/similarity/worker.py", "similarity"),
        ("model/images/segment.py", "mask similarity encode"),
        ("model/images/inputs.py", "encode"),
        ("model/backbones/grounded_sam.py", "mask"),
        ("model/backbones/encoders.py", "similarity encode"),
        ("pipelines/engine/actors.py", ""),
        ("pipelines/curate/duplicates.py", ""),  # runs on the whole table in every run
        ("pipelines/pairs/triplets.py", ""),
        ("model/export.py", ""),
        ("train/trainer.py", ""),
    ],
)
def test_line_changes_the_code_of_the_stages_whose_rows_depend_on_it_and_of_no_other(checkout, module, names):
    assert affected(checkout / module) == set(names.split())


def test_module_newly_imported_by_a_worker_counts_as_its_code(checkout):
    helper, worker = checkout / "pipelines" / "mask" / "edges.py", checkout / "pipelines" / "mask" / "worker.py"
    helper.write_text("WIDTH = 1\n")
    assert affected(helper) == set()
    append(worker, "def edges() -> int:\n    from pipelines.mask.edges import WIDTH\n\n    return WIDTH")
    assert affected(helper) == {"mask"}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_code_of_a_stage_holds_every_module_that_its_worker_loads(name):
    """Compared with sys.modules in a fresh process."""
    rows = STAGES[name].rows
    show = "print(*(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)), sep='\\n')"
    command = [sys.executable, "-c", f"import sys\nimport {rows}\n{show}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {Path(line).relative_to(ROOT) for line in done.stdout.splitlines() if line.startswith(f"{ROOT}{os.sep}")}
    ours = {file for file in loaded if file.parts[0] in ROOMS}
    assert ours and ours <= {file.relative_to(ROOT) for file in closure.closure(rows)}


@pytest.fixture
def curate(tmp_path: Path) -> Callable[[], str]:
    """Runs the curate stage of a copied checkout on nine photos and returns its output."""
    for number in range(9):
        file = tmp_path / "photos" / "mug" / f"{number // 3}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        blocks(number).save(file)
    checkout = tmp_path / "checkout"
    copy_code(checkout)
    shutil.copy(ROOT / "params.yaml", checkout)
    sources = f"sources=[{{name: own, layout: folder, root: {tmp_path / 'photos'}, split: train}}]"
    settings = (sources, "run.device=cpu", "run.workers=1", "curate.shard_subjects=1", f"run.work={tmp_path / 'work'}")
    words = ["--data", str(tmp_path), *(word for setting in settings for word in ("--set", setting))]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PYTHONPATH"] = str(checkout)

    def run() -> str:
        command = [sys.executable, "-m", "pipelines.curate", *words]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_run_with_a_changed_decoder_reuses_no_row_of_the_run_before(curate, tmp_path):
    """The changed decoder inverts photos, so all hashes differ; none comes from a finished shard."""

    def hashes() -> list[bytes]:
        return [row["phash"] for row in tables.rows(tmp_path / "curate", "frames")]

    assert ", 0 done before;" in curate()
    first = hashes()
    said = curate()
    assert len(first) == 9 and hashes() == first
    assert " items in " not in said and ", 0 done before;" not in said, "an unchanged run computes nothing"
    inverted = (
        "def grey(image: Image.Image) -> Image.Image:\n    return rgb(image).convert('L').point(lambda v: 255 - v)"
    )
    append(tmp_path / "checkout" / "model" / "images" / "decode.py", inverted)
    said = curate()
    assert "curate: 3 items in " in said and ", 0 done before;" in said
    assert len(hashes()) == 9 and not set(hashes()) & set(first)
