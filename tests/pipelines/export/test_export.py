"""The command: formats that are read back, same bytes after a kill, folders and stores, the card, bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from PIL import Image

from pipelines import tables
from pipelines.engine import actors
from pipelines.export import command, worker
from pipelines.export.command import NAME, export_pairs
from pipelines.export.formats import FORMATS
from runtime.cli import main as run_command
from runtime.closure import ROOT
from runtime.errors import UserError
from tests.world import exports
from tests.world.exports import SMALL, SUBJECTS, params, write_tables
from tests.world.shard_workers import folder_bytes

PAIRS = 11


def start(folder: Path, workers: int) -> subprocess.Popen[str]:
    """An export of the small tables on a Ray of its own."""
    words = [sys.executable, "-m", "tests.world.exports", str(folder), "webdataset", str(workers)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_same_pairs_are_the_same_bytes_in_any_folder(export):
    first = folder_bytes(export("webdataset"))
    assert folder_bytes(export("webdataset", "again"))[".export.json"] == first[".export.json"]
    assert folder_bytes(export("webdataset", "again")) == first  # a second run of a finished export changes nothing
    assert not any(name.startswith(".export-unfinished") for name in first)


@pytest.mark.parametrize("shard", range(4))
def test_an_export_that_stops_anywhere_resumes_to_the_same_bytes(shard, export, tmp_path, monkeypatch):
    whole = folder_bytes(export("imagefolder"))
    write, done = worker.ExportWorker.write, []

    def dies(self: worker.ExportWorker, part: Any) -> Any:
        if len(done) == shard:  # some of its files are in place already
            list(self.format.write(part, [self.encoded(part.pairs[0])], Path(self.destination.url), self.options))
            raise KeyboardInterrupt
        done.append(part.name)
        return write(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(worker.ExportWorker, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            export("imagefolder", "killed")
    assert len(done) == shard
    left = tmp_path / "killed" / ".export-unfinished" / "train-000002.77"
    left.mkdir(parents=True)
    (left / "half.jpg").touch()
    assert folder_bytes(export("imagefolder", "killed")) == whole


def test_finished_shards_are_not_computed_again(export, tmp_path, monkeypatch):
    export("webdataset")
    for folder in ("curate", "mask", "pairs"):
        assert (tmp_path / "data" / folder).is_dir()
    monkeypatch.setattr(actors, "compute", None)
    export("webdataset")


def test_export_to_an_object_store_has_the_bytes_of_a_folder(export, tmp_path):
    here = folder_bytes(export("imagefolder"))
    store = fsspec.filesystem("memory")
    store.store.clear()
    export_pairs(params(tmp_path), FORMATS["imagefolder"], SMALL, "memory://bucket/pairs/")
    found = {name.removeprefix("/bucket/pairs/"): store.cat_file(name) for name in store.find("/bucket/pairs")}
    assert found.keys() == here.keys() and found == here
    store.store.clear()


def test_store_that_cannot_be_written_is_one_sentence(export, tmp_path, monkeypatch):
    write_tables(tmp_path)
    store = fsspec.filesystem("memory")
    store.store.clear()

    def denied(*given: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(store), "put_file", denied)
    with pytest.raises(UserError, match=r"memory://pairs/\.export\.json cannot be written \(Access Denied\); correct"):
        export_pairs(params(tmp_path), FORMATS["webdataset"], SMALL, "memory://pairs")


def test_pair_that_kills_its_worker_is_left_out_and_counted(export, tmp_path, monkeypatch):
    data = write_tables(tmp_path)
    killer = "s/mug/red/001"

    def crashing(stage: str, missing: Any, work: Any, spool: Any, index: Any, make: Any, run: Any) -> int:
        for shard in missing:
            (item,) = [spool.read(key) for key in shard.keys]
            lost = [name for name in item.frame_ids if name == killer]
            crashed = {item.id: {"rejects": [tables.reject(name, stage, "crashed") for name in lost]}} if lost else {}
            actors.Actor(make, 1).run(work, shard, [item.without(lost)], {}, crashed)
        return len(missing)

    monkeypatch.setattr(actors, "compute", crashing)
    out = export("imagefolder")
    rows = [json.loads(text) for text in (out / "train" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == PAIRS - 1 and killer not in {row["id"] for row in rows}
    assert "| export-pairs | crashed |" in (out / "README.md").read_text(encoding="utf-8")
    assert json.loads((data / NAME / "metrics.json").read_text())["rejected"] == 1


def test_card_counts_what_is_there_and_what_is_not(export, tmp_path):
    rejects = [tables.reject(f"s/cup/blue/{n}", "curate", "blurred", "0.1") for n in (7, 8)]
    write_tables(tmp_path)
    tables.write(tmp_path / "data" / "curate", "rejects", tables.from_rows("rejects", rejects))
    (tmp_path / "data" / "curate" / "metrics.json").write_text('{"input": 14, "kept": 12, "reasons": {"blurred": 2}}')
    out = export("webdataset", validation=0.5)
    text = (out / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["size_categories"] == ["n<1K"] and "license" not in head
    assert [entry["split"] for entry in head["configs"][0]["data_files"]] == ["train", "validation"]
    for row in (
        "| train | 4 | 1 |",
        "| validation | 7 | 2 |",
        "| mug | 7 |",
        "| 30° to 45° | 7 |",
        "| no camera poses | 4 |",
        "| unknown | not known here | 11 |",
        "| curate | blurred | sharpness is below curate.filters.min_sharpness | 2 |",
        "| export | one_photo |",
        "| curate | input 14, kept 12 |",
        "| target_box | x0, y0, x1, y1",
    ):
        assert row in body, row
    assert str(tmp_path) not in text
    metrics = json.loads((tmp_path / "data" / NAME / "metrics.json").read_text())
    assert metrics["pairs"] == {"train": 4, "validation": 7} and metrics["kept"] == PAIRS
    assert metrics["dropped"] == {"curate": {"blurred": 2}} and metrics["left_out"] == {"one_photo": 1}
    sheet = Image.open(out / "examples.jpg")
    assert sheet.width > 2 * 2 * 192 and sheet.height > 2 * 192  # three pairs, two beside each other


def test_licence_and_attribution_travel_to_every_pair(export, tmp_path, capsys):
    write_tables(tmp_path, licence="CC-BY-4.0", attribution="Ann, https://a.example/1")
    out = export("imagefolder")
    first = json.loads((out / "train" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["target_licence"] == first["reference_licence"] == "CC-BY-4.0"
    assert first["target_attribution"] == "Ann, https://a.example/1"
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "license: cc-by-4.0" in text and "| CC-BY-4.0 | no such limits | 11 |" in text and "`licences.csv`" in text
    assert (out / "licences.csv").read_text(encoding="utf-8").splitlines() == [
        "subject,licence,attribution",
        *(f'{subject},CC-BY-4.0,"Ann, https://a.example/1"' for subject in SUBJECTS),
    ]
    assert "warning" not in capsys.readouterr().out


def test_pairs_of_photos_that_may_not_be_passed_on_are_named(export, tmp_path, capsys):
    write_tables(tmp_path, licence="CC-BY-ND-2.0")
    out = export("ai-toolkit")  # has no place for columns
    assert "s/cup/blue,CC-BY-ND-2.0,\n" in (out / "licences.csv").read_text(encoding="utf-8")
    assert (
        "warning: the licences of these pairs do not allow run.purpose research and passing them on: 11 CC-BY-ND-2.0"
        in (capsys.readouterr().out)
    )
    write_tables(tmp_path)
    assert not (export("ai-toolkit", "other") / "licences.csv").exists()


def test_folder_of_something_else_is_refused(export, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"mine holds files that are no export; name a new folder"):
        export("webdataset", "mine")
    out = export("webdataset")
    with pytest.raises(UserError, match="holds an export of other tables, with other options or by another version"):
        export("webdataset", size=48)
    (out / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"out/train-000001.tar was removed; remove the folder and run the same"):
        export("webdataset")
    for file in [*out.iterdir()]:
        file.unlink()
    assert len(folder_bytes(export("webdataset"))) == 4 + 3  # of shards that were in the folder none counts as done
    with pytest.raises(UserError, match=r"thesis\.txt is a file; name a folder"):
        export_pairs(params(tmp_path), FORMATS["webdataset"], SMALL, str(tmp_path / "mine" / "thesis.txt"))
    with pytest.raises(UserError, match="--out nowhere://x cannot be opened"):
        export_pairs(params(tmp_path), FORMATS["webdataset"], SMALL, "nowhere://x")


def test_tables_without_a_pair_are_one_sentence(export, tmp_path):
    write_tables(tmp_path, views=1)
    with pytest.raises(UserError, match=r"make no pair \(3 one_photo\); photograph subjects from several sides"):
        export("webdataset")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no table 'triplets'; run the stage that writes it"):
        export_pairs(params(tmp_path / "empty"), FORMATS["webdataset"], SMALL, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "8"], "--size 8 is too small; give 16 or more"),
        (["--per-subject", "0"], "--per-subject 0 is too small; give 1 or more"),
        (["--shard-pairs", "0"], "--shard-pairs 0 is too small"),
        (["--quality", "101"], "--quality 101 is not in 1..100"),
        (["--validation", "1"], "--validation 1 is not a share; give 0 or more, and less than 1"),
        (["--validation", "nan"], "--validation nan is not a share"),
    ],
)
def test_number_out_of_range_is_one_sentence(words, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run_command(["export-pairs", "--format", "webdataset", "--out", str(tmp_path / "out"), *words])
    assert stop.value.code == 1 and f"error: {said}" in capsys.readouterr().err


def test_format_that_does_not_exist_is_a_usage_error_with_the_formats(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run_command(["export-pairs", "--format", "tfrecord", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "invalid choice: 'tfrecord'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_command(["export-pairs", "--help"])
    shown = capsys.readouterr().out
    assert all(form.summary in shown for form in FORMATS.values())


def test_command_hands_its_options_on(monkeypatch, tmp_path):
    seen: list[Any] = []
    monkeypatch.setattr(command, "export_pairs", lambda *given: seen.append(given))
    words = ["--size", "64", "--reference", "alpha", "--with", "angle", "mask", "--per-subject", "5", "--views", "2"]
    run_command(["export-pairs", "--format", "webdataset", "--out", "o", "--data", str(tmp_path), *words])
    ((given, form, options, out),) = seen
    assert (given.data, form, out) == (tmp_path, FORMATS["webdataset"], "o")
    assert options == replace(
        SMALL, size=64, reference="alpha", fields=("mask", "angle"), per_subject=5, views=2, part=1000
    )


@pytest.mark.slow
def test_killed_export_on_ray_ends_with_the_bytes_of_one_that_was_not(tmp_path):
    write_tables(tmp_path)
    shutdown = time.monotonic() + 300
    killed = start(tmp_path, 1)
    while time.monotonic() < shutdown and killed.poll() is None and not list((tmp_path / "out").glob("*.tar")):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert list((tmp_path / "out").glob("*.tar")) and not (tmp_path / "out" / "README.md").exists()
    resumed = start(tmp_path, 2)
    said, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, said
    whole = tmp_path / "whole"
    export_here(tmp_path, whole)
    assert folder_bytes(tmp_path / "out") == folder_bytes(whole)


def export_here(folder: Path, out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actors, "compute", exports.compute_here)
        export_pairs(params(folder), FORMATS["webdataset"], SMALL, str(out))
