"""Every table a report can read, of a small world; a hostile string wherever text of a source or prompt appears."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eval.report import sections
from eval.report import stage as report
from eval.report.album import Album
from eval.score import metrics
from pipelines import tables
from pipelines.photos.roots import Roots
from runtime.files import write_json, write_text

PARAMS = sections.ReportParams(
    title="A run",
    side=48,
    subjects=9,
    pictures=9,
    ranked_by=("dino_i", "clip_t"),
    picks=1,
    side_by_side=2,
    misses=4,
    masks=4,
    triplets=4,
    heat_map=9,
    neighbours=2,
    rejects=2,
)
METHODS = (metrics.MODEL, "other", metrics.PROMPT_ONLY)


@pytest.fixture
def sources(data: Path, roots: Roots) -> sections.Sources:
    return sections.Sources(data, Album(data, roots, PARAMS.side), PARAMS)


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    tables.write(folder, name, tables.from_rows(name, rows))


@pytest.fixture
def full(sources: sections.Sources, data: Path, fakes: SimpleNamespace) -> sections.Sources:
    """Every table a report can read, with a hostile string wherever text of a source or prompt appears."""
    bad = fakes.hostile
    keys = ((-1, "reconstruction"), (0, "scene"), (1, bad), (2, bad), (3, bad))
    write(data / "generate", "generations", [
        {
            "method": method,
            "subject_id": subject,
            "class_name": bad,
            "partner": None,
            "prompt_id": prompt_id,
            "group": group,
            "prompt": f"a {bad} {prompt_id}",
            "index": 0,
            "seed": 1,
            "reference": f"{subject}/01",
            "image": fakes.png(fakes.draw((200, 9, 9), prompt_id, (9, 90, 90))[0]),
        }
        for method in METHODS
        for subject in ("bench/duck", "bench/mug")
        for prompt_id, group in keys
    ])  # fmt: skip
    write(data / "score", "scores", [
        {
            "method": method,
            "subject_id": subject,
            "prompt_id": prompt_id,
            "group": group,
            "index": 0,
            "metric": metric,
            "value": value,
        }
        for subject in ("bench/duck", "bench/mug")
        for method, asked in (
            *((method, keys) for method in METHODS), (metrics.COPY, keys), (metrics.REAL, ((-1, "photo"),))
        )
        for prompt_id, group in asked
        for metric, value in (
            ("clip_t", None if method == "real" else 0.25),
            ("reward", None if method == "real" else -0.25),
            ("clip_i", 0.75 if method == "real" else 0.8),
            ("dino_i", 0.5 - 0.1 * (prompt_id == 1) + 0.1 * (subject == "bench/mug")),
            ("copy_paste", 0.125),
        )
    ])  # fmt: skip
    write(data / "score", "segmentations", [
        {
            "method": method,
            "subject_id": subject,
            "prompt_id": prompt_id,
            "group": group,
            "index": 0,
            "segmented": prompt_id != 0,
            "score": 0.25 if prompt_id == 0 else 0.75,
            "box": None,
            "rle": None,
            "height": fakes.side,
            "width": fakes.side,
        }
        for method in METHODS
        for subject in ("bench/duck", "bench/mug")
        for prompt_id, group in keys
    ])  # fmt: skip
    intervals = {"resamples": 50, "level": 0.9, "seed": 0}
    scored = {"id": "abc", "miss": "zero", "encoders": {"clip": f"{bad}@abc"}, "intervals": intervals}
    write_json(data / "score" / "protocol.json", scored)
    place = {"subject_id": "bench/duck", "group": "scene", "prompt_id": 0, "index": 0}
    write(data / "location", "location_masks", [
        {**place, "step": step, "timestep": 900 - step, "height": 2, "width": 2, "map": bytes([0, 255, 0, 0])}
        for step in (0, 4)
    ])  # fmt: skip
    unit = np.array([1.0, 0.0], np.float16)
    write(data / "views", "view_tokens", [
        {"subject_id": subject, "frame_id": f"{subject}/{n:02d}", "level": 0, "class_name": bad, "vector": unit}
        for subject in ("bench/duck", "bench/mug")
        for n in range(2)
    ])  # fmt: skip
    numbers = {"auc": 0.75, "auc_same_class": None, "cosine_same_subject": 0.5, "cosine_other_subjects": 0.25}
    level = {**numbers, "silhouette_subject": 0.625, "silhouette_view": -0.125}
    of = {"s_plus": numbers, "image_encoder": level, "levels": {"0": level}}
    write_json(data / "views" / "metrics.json", {"photos": 4, "subjects": 2, "timestep": 500, "level_count": 1, **of})
    lines = [f"bench/{s},bench/{s}/{n:02d},0,{n},{n}" for s in ("duck", "mug") for n in range(2)]
    write_text(data / "views" / "map.csv", "\n".join(["subject_id,frame_id,level,x,y", *lines]) + "\n")
    shown = ("photos", "bench/duck/01.png", (0.1, 0.1, 0.6, 0.9))
    write(data / "curate", "rejects", [
        tables.reject(f"{bad}/1", "curate", "blurred", bad),
        tables.reject("bench/duck/99", "curate", "subject_cut", bad, *shown),
    ])  # fmt: skip
    write(data / "mask", "rejects", [tables.reject("bench/ring/00", "mask", "mask_missing")])
    triplet = {
        "triplet_id": f"{bad}/0",
        "subject_id": "bench/duck",
        "class_name": bad,
        "reference": "bench/duck/00",
        "positive": "bench/duck/01",
        "target": "gone/from/disk",
        "reference_target_angle": 30.0,
        "reference_positive_angle": 20.0,
        "method": "pose",
    }
    write(data / "pairs", "triplets", [triplet])
    counts = {"photos": 3, "photos_used": 1, "not_usable": {"border": 1, bad: 1}}
    counts |= {"subjects_without_photo": 1, "subjects_left_with_one_photo": 2}
    write_json(data / "pairs" / "metrics.json", counts)
    tile = {"tile_id": "0", "grouping": 0, "group": 0, "values": np.array([1, 0.5, 0.5, 1], np.float16)}
    ids = ["bench/duck", "bench/mug"]
    write(data / "similarity", "similarity", [tile | {"row_subjects": ids, "column_subjects": ids}])
    near = {"subject_id": ids[0], "neighbours": [ids[1]], "cosines": np.array([0.5], np.float16)}
    write(data / "similarity", "neighbours", [near, near | {"subject_id": ids[1], "neighbours": [ids[0]]}])
    write(data / "mask", "agreement", [
        {"frame_id": f"bench/duck/{n:02d}", "class_name": bad, "height": fakes.side, "width": fakes.side, "score": 0.5,
         "annotated": tables.encode_mask(mask), "found": found and tables.encode_mask(mask.T), "iou": iou}
        for n, (mask, found, iou) in enumerate(
            [(fakes.draw((1, 2, 3), 0, (9, 9, 9))[1], True, 0.25), (fakes.draw((1, 2, 3), 1, (9, 9, 9))[1], None, None)]
        )
    ])  # fmt: skip
    write_json(data / "curate" / "metrics.json", {"input": 3, "kept": 2, "rejected": 1, bad: 7})
    losses = ["step,diffusion,cscl,macl,location,total"] + [f"{s},{1 / s},1,1,0,2" for s in range(1, 40)]
    write_text(data / "train" / "losses.csv", "\n".join(losses) + "\n")
    return sources


drawn: list[str] = []


@pytest.fixture
def page(full: sections.Sources) -> str:
    """The report of that world; the same world, the same text, so it is drawn once."""
    if not drawn:
        drawn.append(report.page(full))
    return drawn[0]
