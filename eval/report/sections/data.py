"""Results of the data stages: masks, training triplets, similarity of subjects, rejects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.protocol.protocol import HeldOutPhoto
from eval.report import charts
from eval.report.album import present, sample
from eval.report.sections.base import STAGES, Missing, Sources, need, read_json
from pipelines import tables
from pipelines.photos.licences import of_frames, terms

ANGLES = ("reference_target_angle", "reference_positive_angle")
FLAGS = {
    "small": "covers too little of the photo",
    "large": "covers nearly the whole photo",
    "border": "cut off by the photo's border",
    "off_box": "box differs from the annotated or detected one",
    "several": "another box scores nearly as high",
    "low_score": "low confidence",
}
NO_MASK = "no_mask"
"""Reason of `pipelines.pairs` for a photo without a row in the masks table."""
NEIGHBOURS = 4  # shown beside a subject; fits the width of a phone


def masks(sources: Sources) -> dict[str, Any]:
    """Photos with outlined masks, by method."""
    folder = need(sources.data, "mask", "masks")
    columns = ["frame_id", "method", "quality", "score", "mask_score", "area"]
    rows = tables.read(folder, "masks", columns).to_pylist()
    methods = []
    for method, total in tables.count_by(row["method"] for row in rows).items():
        chosen = sample((row for row in rows if row["method"] == method), "frame_id", sources.params.masks)
        photos = sources.album.photos(row["frame_id"] for row in chosen)
        sheet = [{**row, "image": sources.album.overlay(photos.get(row["frame_id"]))} for row in chosen]
        methods.append({"name": method, "total": total, "photos": sheet})
    quality = tables.count_by(row["quality"] for row in rows)
    return {"methods": methods, "quality": quality, "flags": FLAGS, "agreement": agreement(sources)}


def agreement(sources: Sources) -> dict[str, Any] | None:
    """Agreement of Grounded SAM's masks with the annotated ones; None if no photo has both.

    The photos shown are evenly spaced from lowest to highest IoU, not cherry-picked.
    """
    folder = sources.data / "mask"
    if not present(folder, "agreement"):
        return None
    rows = tables.read(folder, "agreement").to_pylist()
    both = sorted((row for row in rows if row["iou"] is not None), key=lambda row: (row["iou"], row["frame_id"]))
    if not both:
        return None
    count = min(sources.params.masks, len(both))
    chosen = [both[round(i * (len(both) - 1) / max(count - 1, 1))] for i in range(count)]
    photos = sources.album.photos(row["frame_id"] for row in chosen)
    values = [row["iou"] for row in both]
    return {
        "photos": len(rows),
        "both": len(both),
        "mean": float(np.mean(values)),
        "median": float(np.median(values)),
        "sheet": [{**row, "image": sources.album.compared(photos.get(row["frame_id"]), row)} for row in chosen],
    }


def rejects(sources: Sources) -> dict[str, Any]:
    """Rejected photos and subjects, by stage and reason, with examples."""
    ran = [stage for stage in STAGES if present(sources.data / stage, "rejects")]
    if not ran:
        raise Missing("curate")
    stages: list[dict[str, Any]] = []
    for stage in ran:
        folder = sources.data / stage
        counts = tables.count_by(row["reason"] for row in tables.rows(folder, "rejects", ["reason"]))
        reasons = [
            {
                "name": name,
                "count": count,
                "meaning": tables.REJECT_REASONS.get(name, ""),
                "examples": examples(sources, folder, name),
            }
            for name, count in counts.items()
        ]
        stages.append({"name": stage, "total": sum(counts.values()), "reasons": reasons})
    return {"stages": stages, "largest": max((r["count"] for s in stages for r in s["reasons"]), default=1)}


def examples(sources: Sources, folder: Path, reason: str) -> list[dict[str, Any]]:
    """Return some rows of the rejects table with that reason, each with its photo."""
    rows = (row for row in tables.rows(folder, "rejects") if row["reason"] == reason)
    chosen = sample(rows, "id", sources.params.rejects)
    photos: dict[str, HeldOutPhoto] = {}
    if any(row["path"] is None for row in chosen) and present(sources.data / "curate", "frames"):
        photos = sources.album.photos(row["id"] for row in chosen)
    return [{**row, "image": sources.album.rejected(row, photos)} for row in chosen]


def licences(sources: Sources) -> dict[str, Any]:
    """Photos by source and licence, and how many of them the triplets use."""
    need(sources.data, "curate", "frames")
    trained: dict[tuple[str, str], int] = {}
    if present(sources.data / "pairs", "triplets"):
        used = of_frames(sources.data, triplets=True)
        trained = {(one.source, one.licence): one.photos for one in used}
    rows = []
    for one in of_frames(sources.data):
        asked = terms(one.licence)
        rows.append(
            one.plain()
            | {
                "terms": asked.text() if asked else "not known here",
                "trained": trained.get((one.source, one.licence), 0),
            }
        )
    return {"rows": rows}


def triplets(sources: Sources) -> dict[str, Any]:
    """Training triplets and the angles between their views."""
    folder = need(sources.data, "pairs", "triplets")
    columns = tables.read(folder, "triplets", ["method", "class_name", *ANGLES])
    by_method = tables.count_by(columns["method"].to_pylist())
    by_class = tables.count_by(columns["class_name"].to_pylist())
    share = -(-sources.params.triplets // max(len(by_method), 1))
    chosen = [
        t
        for m in sorted(by_method, reverse=True)
        for t in sample((r for r in tables.rows(folder, "triplets") if r["method"] == m), "triplet_id", share)
    ]
    photos = sources.album.photos({row[role] for row in chosen for role in ("reference", "positive", "target")})
    sheet = [
        {
            **row,
            "reference": sources.album.segment(photos.get(row["reference"])),
            "positive": sources.album.segment(photos.get(row["positive"])),
            "target": sources.album.whole(photos.get(row["target"])),
        }
        for row in chosen
    ]
    angles = {name: columns[name].drop_null().to_numpy() for name in ANGLES}
    chart = None
    if any(values.size for values in angles.values()):
        chart = charts.histogram(angles, (0.0, 180.0), 36, "angles")
    return {
        "rows": sheet,
        "total": columns.num_rows,
        "by_method": by_method,
        "classes": len(by_class),
        "largest_class": next(iter(by_class.items()), None),
        "counts": read_json(folder / "metrics.json", "pairs"),
        "reasons": {**FLAGS, **tables.REJECT_REASONS, NO_MASK: "no mask"},
        "chart": chart,
    }


def similarity(sources: Sources) -> dict[str, Any]:
    """Cosine similarity between subjects, and some subjects with their nearest neighbours."""
    folder = need(sources.data, "similarity", "similarity")
    columns = ["row_subjects", "column_subjects", "values"]
    tile = next(tables.batches(folder, "similarity", columns, 1), None)  # a tile has a million values
    if tile is None:
        raise Missing("similarity")
    ids, others = (tile[name][0].as_py() for name in columns[:2])
    cosines = tile["values"].flatten().to_numpy(zero_copy_only=False).reshape(len(ids), len(others))
    near = sample(tables.rows(folder, "neighbours"), "subject_id", sources.params.neighbours)
    beside = {name for row in near for name in (row["subject_id"], *row["neighbours"][:NEIGHBOURS])}
    first = first_photos(sources.data, {*ids, *beside})
    order = sorted(range(len(ids)), key=lambda i: (first.get(ids[i], ("", ""))[0], ids[i]))
    count = min(sources.params.heat_map, len(order))
    shown = [order[i * len(order) // count] for i in range(count)]
    labels = [first.get(ids[i], ("?", ""))[0] for i in shown]
    return {
        "subjects": len(ids),
        "shown": count,
        "chart": charts.heat_map(cosines[np.ix_(shown, shown)].astype(np.float32), labels, "similarity"),
        "neighbours": nearest(sources, near, first),
    }


def first_photos(data: Path, subjects: set[str]) -> dict[str, tuple[str, str]]:
    """Return the class noun and first photo of each of `subjects`."""
    first: dict[str, tuple[str, str]] = {}
    for row in tables.rows(data / "curate", "frames", ["frame_id", "subject_id", "class_name"]):
        if row["subject_id"] in subjects:
            first.setdefault(row["subject_id"], (row["class_name"], row["frame_id"]))
    return first


def nearest(
    sources: Sources, rows: Sequence[dict[str, Any]], first: dict[str, tuple[str, str]]
) -> list[dict[str, Any]]:
    """Return rows of the neighbours table as segments of a subject and its nearest neighbours, with their cosines."""
    lines = []
    for row in rows:
        others = zip(row["neighbours"][:NEIGHBOURS], row["cosines"], strict=False)
        line = [(row["subject_id"], 1.0), *((name, float(cosine)) for name, cosine in others)]
        lines.append([(name, cosine) for name, cosine in line if name in first])
    photos = sources.album.photos(first[name][1] for line in lines for name, _ in line)
    return [
        {
            "subjects": [
                {
                    "id": name,
                    "class_name": first[name][0],
                    "cosine": cosine,
                    "image": sources.album.segment(photos.get(first[name][1])),
                }
                for name, cosine in line
            ]
        }
        for line in lines
        if line
    ]
