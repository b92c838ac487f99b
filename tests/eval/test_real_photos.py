"""The oracles on real photographs of DreamBench, where they are at hand: the whole stage, with the toybox's models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from eval.generate.params import GenerateParams
from eval.protocol.plan import plan_of
from eval.protocol.protocol import held_out, read_segment
from eval.score import stage as score
from model.backbones.clip import load_clip
from model.backbones.variant import load_variant
from pipelines import tables
from pipelines.curate.worker import CurateParams, CurateWorker, pack
from pipelines.mask.worker import MaskParams, MaskWorker
from pipelines.photos.roots import Roots, SourceParams
from pipelines.sources import open_source
from runtime.params import Params, parse

ROOT = Path(__file__).parents[2]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
EVERY = 10  # of the subjects, so that the test stays quick
# The toybox's detector has not seen such photos: its best box stands for the subject, wherever it lies.
LENIENT = {"min_area": 0.0, "max_area": 1.0, "max_border_contact": 1.0, "min_score": 0.0, "min_box_iou": 0.0}
ANY_BOX = {"min_detection": 0.0, "quality": PARAMS["mask"]["quality"] | LENIENT}


@pytest.fixture
def source(real_data: Path) -> SourceParams:
    return SourceParams(name="dreambench", layout="dreambench", root=str(real_data / "dreambench"), split="test")


@pytest.fixture
def data(source: SourceParams, tmp_path: Path) -> Path:
    """The tables of curate and mask of some subjects."""
    subjects = list(open_source(source).subjects())[::EVERY]
    worker = CurateWorker(parse("curate", PARAMS["curate"], CurateParams), [source])
    frames = [rows["frames"] for rows in worker.compute([pack(subject) for subject in subjects])]
    masks = MaskWorker(parse("mask", PARAMS["mask"] | ANY_BOX, MaskParams), "toybox", [source], "cpu").compute(frames)
    folder = tmp_path / "data"
    for stage, name, rows in (
        ("curate", "frames", [row for group in frames for row in group]),
        ("curate", "prompts", []),
        ("mask", "masks", [row for made in masks for row in made["masks"]]),
    ):
        tables.write(folder / stage, name, tables.from_rows(name, rows))
    return folder


def test_real_photos_against_each_other_and_copied(
    data: Path,
    source: SourceParams,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    sources = yaml.safe_dump([source.model_dump()], default_flow_style=True)
    monkeypatch.chdir(ROOT)
    settings = [f"sources={sources}", f"run.work={tmp_path}/work", "run.device=cpu"]
    score.main(Params.read(settings=settings, data=str(data)), photos_only=True)
    # The id that generations of these photos would have, so that both may stand in one table.
    rules = parse("generate", PARAMS["generate"], GenerateParams).protocol
    told = json.loads((data / "score" / "protocol.json").read_text())
    assert told["id"] == plan_of(data, rules).id(rules.reference, load_variant("toybox").resolution)
    rows = tables.read(data / "score", "scores").to_pylist()
    value = {(r["method"], r["subject_id"], r["prompt_id"], r["index"], r["metric"]): r["value"] for r in rows}
    clip = load_clip(load_variant("toybox").clip, "cpu", batch_size=8)
    subjects = held_out(data)
    assert len(subjects) == 3
    for subject in subjects:
        assert len(subject.photos) > 1 and all(photo.quality == "ok" for photo in subject.photos)
        segments = [read_segment(Roots([source]), photo, PARAMS["score"]["margin"]) for photo in subject.photos]
        vectors = clip.encode_image(segments).numpy()
        for number in range(len(segments)):
            others = [vectors[number] @ other for place, other in enumerate(vectors) if place != number]
            found = value["real", subject.subject_id, -1, number, "clip_i"]
            assert found == pytest.approx(np.mean(others), abs=1e-5)
        copy = {name: value["copy", subject.subject_id, -1, 0, name] for name in PARAMS["score"]["metrics"]}
        assert copy["clip_i"] == pytest.approx(np.mean(vectors @ vectors[0]), abs=1e-5)
        assert copy["copy_paste"] == pytest.approx(1, abs=1e-3)
        assert np.isfinite(copy["reward"]) and -1 <= copy["clip_t"] <= 1
