"""From the videos of docs/toybox_videos to a WebDataset by the stages that docs/pairs.md names, without Ray."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from pipelines import tables
from pipelines.curate import stage as curate
from pipelines.engine import actors
from pipelines.export import command as export
from pipelines.mask import stage as mask
from pipelines.pairs import stage as pairs
from pipelines.similarity import stage as similarity
from runtime.closure import ROOT
from runtime.params import Params
from tests.world.commands import run
from tests.world.exports import compute_here

FRAMES = 4


def test_videos_of_the_documentation_become_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(actors, "compute", compute_here)
    source = {"name": "video", "layout": "video", "root": str(ROOT / "docs/toybox_videos"), "split": "train"}
    settings = [f"sources={json.dumps([source])}", f"run.work={tmp_path / 'work'}", "run.device=cpu"]
    settings += ["run.decoders=0", f"curate.video.frames={FRAMES}"]
    params = Params.read(settings=settings, data=str(tmp_path / "data"))
    for stage in (curate, mask, similarity, pairs):
        stage.main(params)
    frames = tables.read(tmp_path / "data/curate", "frames", ["subject_id", "path"]).to_pylist()
    assert len(frames) == 3 * FRAMES and len({row["subject_id"] for row in frames}) == 3
    words = [word for setting in settings for word in ("--set", setting)]
    run(export, ["--format", "webdataset", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "data"), *words])
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    targets = [name for name in files if name.endswith(".target.jpg")]
    assert len(targets) >= 3 * FRAMES - 3
    assert {Image.open(io.BytesIO(files[name])).size for name in targets} == {(64, 64)}
    row = json.loads(files[targets[0].replace(".target.jpg", ".json")])
    assert row["class"] in ("mug", "mushroom", "rocket") and row["method"] == "order"
