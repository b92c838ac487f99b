"""The sections of the report: each reads what its stages left and returns what the page shows, or raises `Missing`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from eval import charts, metrics
from eval.pictures import Album, Picture, inline, present, sample
from eval.protocol import RECONSTRUCTION, Photo
from params import Section, UserError
from pipelines import tables
from stage import digest_files

PUBLISHED = Path(__file__).parent / "published.json"
STAGES = ("curate", "mask", "similarity", "encode", "train", "generate", "score")
ANGLES = ("reference_target_angle", "reference_positive_angle")
LOSSES = {
    "total": "weighted sum",
    "diffusion": "diffusion: error on the noise",
    "cscl": "CSCL: visual against textual tokens",
    "macl": "MACL: subjects against subjects, scaled by likeness",
    "location": "location: attention on the subject, falls below 0",
}


FLAGS = {
    "small": "covers too little of the photo",
    "large": "covers nearly all of it",
    "border": "cut off by the photo's border",
    "off_box": "another box than the annotated or detected one",
    "low_score": "the models are unsure",
}
NEIGHBOURS = 4  # shown beside a subject: as many as a line of a phone has room for


class ReportParams(Section):
    """How much the page shows; nothing of it changes a number."""

    title: str
    side: int = Field(ge=16)  # px; larger pictures are scaled down to it
    subjects: int  # held-out subjects in the picture grid
    pictures: int  # generations of each of them
    masks: int  # photos with their masks outlined, of each method
    triplets: int
    heat_map: int  # subjects on a side of the similarity map
    neighbours: int  # subjects shown with the most similar others
    rejects: int  # examples of each reason


class Missing(Exception):
    """A stage has not run; its name is the message."""


@dataclass(frozen=True)
class Sources:
    """What sections read: the folder of the tables, the photos, the limits."""

    data: Path
    album: Album
    params: ReportParams


def need(data: Path, stage: str, table: str) -> Path:
    """Return the stage's folder if it holds the table."""
    if not present(data / stage, table):
        raise Missing(stage)
    return data / stage


def read_json(file: Path, stage: str) -> dict[str, Any]:
    """Return a JSON file that `stage` writes."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Missing(stage) from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); run the {stage} stage again") from None


def gallery(sources: Sources) -> dict[str, Any]:
    """Rows of pictures: reference, its segment, what was generated."""
    data, params = sources.data, sources.params
    folder = need(data, "generate", "generations")
    subject_ids = set(tables.read(folder, "generations", ["subject_id"])["subject_id"].to_pylist())
    made: list[tuple[str, list[dict[str, Any]]]] = []
    ours = (row for row in tables.rows(folder, "generations") if row["method"] == metrics.MODEL)
    for subject_id, group in groupby(ours, key=lambda row: row["subject_id"]):
        if len(made) == params.subjects:
            break
        first = sorted((row for row in group if row["index"] == 0), key=lambda row: row["prompt_id"])
        made.append((subject_id, first[: params.pictures]))
    photos = sources.album.photos({pictures[0]["reference"] for _, pictures in made})
    scores = scores_by_picture(data)
    subjects = []
    for subject_id, pictures in made:
        photo = photos.get(pictures[0]["reference"])
        subjects.append(
            {
                "id": subject_id,
                "class_name": pictures[0]["class_name"],
                "reference": sources.album.whole(photo),
                "segment": sources.album.segment(photo),
                "pictures": [
                    {
                        "image": generated(row["image"], params.side),
                        "prompt": row["prompt"],
                        "group": row["group"],
                        "rebuilt": row["group"] == RECONSTRUCTION,
                        "score": scores.get((subject_id, row["group"], row["prompt_id"], row["index"])),
                    }
                    for row in pictures
                ],
            }
        )
    return {"subjects": subjects, "total": len(subject_ids)}


def generated(png: bytes, side: int) -> Picture:
    """Return a generated picture as a data URI."""
    return inline(Image.open(io.BytesIO(png)).convert("RGB"), side)


def scores_by_picture(data: Path) -> dict[tuple[str, str, int, int], dict[str, Any]]:
    """Return the model's scores of each picture; none before the score stage."""
    if not present(data / "score", "scores"):
        return {}
    rows = (row for row in tables.rows(data / "score", "scores") if row["method"] == metrics.MODEL)
    return {(row["subject_id"], row["group"], row["prompt_id"], row["index"]): row for row in rows}


def scores(sources: Sources) -> dict[str, Any]:
    """The score table, charts by group of prompts, the published table."""
    folder = need(sources.data, "score", "scores")
    by_method = metrics.summaries(tables.read(folder, "scores").to_pylist())
    model, real = by_method.get(metrics.MODEL), by_method.get(metrics.REAL, {})
    above = [
        name
        for name in ("R-CI", "E-CI", "R-DI", "E-DI")
        if model and model[name] is not None and real.get(name) is not None and model[name] > real[name]
    ]
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return {
        "methods": by_method,
        "metrics": metrics.METRICS,
        "protocol": read_json(folder / "protocol.json", "score"),
        "above_real": above,
        "charts": group_charts(by_method),
        "published": published,
    }


def group_charts(by_method: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Return a bar chart for each metric; nothing where the model was not scored."""
    if metrics.MODEL not in by_method:
        return []
    titles = {"CT": "CLIP-T: prompt followed", "CI": "CLIP-I: subject kept", "DI": "DINO-I: subject kept"}
    result = []
    for metric, title in titles.items():
        bars = {
            group: {
                method: by_method[method]["groups"].get(group, {}).get(metric)
                for method in (metrics.MODEL, metrics.COPY)
                if method in by_method
            }
            for group in by_method[metrics.MODEL]["groups"]
        }
        real = by_method.get(metrics.REAL, {}).get("groups", {}).get(metrics.PHOTO, {}).get(metric)
        result.append({"title": title, "svg": charts.bars_by_group(bars, real, f"group-{metric}")})
    return result


def training(sources: Sources) -> dict[str, Any]:
    """A curve for each loss."""
    file = sources.data / "train" / "losses.csv"
    if not file.is_file():
        raise Missing("train")
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    columns = [name for name in LOSSES if rows and name in rows[0]]
    if not columns or "step" not in rows[0]:
        raise UserError(f"{file} has no rows with the columns step, {', '.join(LOSSES)}; run the train stage again")
    try:
        values = {name: [float(row[name]) for row in rows] for name in ("step", *columns)}
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} holds what is no number ({error}); run the train stage again") from None
    curves = [
        {
            "title": LOSSES[name],
            "last": float(np.mean(values[name][-max(1, len(rows) // 20) :])),
            "svg": charts.curve(values["step"], values[name], f"loss-{name}"),
        }
        for name in columns
    ]
    return {"curves": curves, "steps": int(max(values["step"]))}


def masks(sources: Sources) -> dict[str, Any]:
    """Photos with the outline of their masks, by method."""
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
    """How far Grounded SAM's masks agree with those shipped with the photos; None where no photo has both.

    The photos shown are at equal steps from the least agreement to the most, so that none is picked.
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
    """What was dropped, by stage and reason, with examples."""
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
    photos: dict[str, Photo] = {}
    if any(row["path"] is None for row in chosen) and present(sources.data / "curate", "frames"):
        photos = sources.album.photos(row["id"] for row in chosen)
    return [{**row, "image": sources.album.rejected(row, photos)} for row in chosen]


def triplets(sources: Sources) -> dict[str, Any]:
    """Training samples and the angles between their views."""
    folder = need(sources.data, "curate", "triplets")
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
        "chart": chart,
    }


def similarity(sources: Sources) -> dict[str, Any]:
    """The cosines between subjects, and subjects beside those most like them."""
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
    """Return class noun and first photo of each of `subjects`."""
    first: dict[str, tuple[str, str]] = {}
    for row in tables.rows(data / "curate", "frames", ["frame_id", "subject_id", "class_name"]):
        if row["subject_id"] in subjects:
            first.setdefault(row["subject_id"], (row["class_name"], row["frame_id"]))
    return first


def nearest(
    sources: Sources, rows: Sequence[dict[str, Any]], first: dict[str, tuple[str, str]]
) -> list[dict[str, Any]]:
    """Return rows of the neighbours table as segments of a subject and of those most like it, with their cosines."""
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


def stages(sources: Sources) -> dict[str, Any]:
    """What each stage counted, from its metrics.json."""
    rows = []
    for stage in STAGES:
        file = sources.data / stage / "metrics.json"
        values = read_json(file, stage) if file.is_file() else None
        known = ("input", "kept", "rejected")
        plain = {k: v for k, v in (values or {}).items() if isinstance(v, int | float) and k not in known}
        rows.append(
            {"name": stage, "ran": values is not None, "more": plain, **{k: (values or {}).get(k) for k in known}}
        )
    return {"rows": rows}


def inputs(sources: Sources) -> list[tuple[str, str]]:
    """Return (table or file, hash of its bytes) of everything a stage has left."""
    found = []
    for stage in STAGES:
        folder = sources.data / stage
        names = sorted({part.parent.name for part in folder.glob("*/part-*.parquet")})
        found += [(f"{stage}/{name}", digest_files(*tables.parts(folder, name))) for name in names]
        for extra in ("adapter", "losses.csv"):
            if (folder / extra).exists():
                found.append((f"{stage}/{extra}", digest_files(folder / extra)))
    return found


SECTIONS: dict[str, Callable[[Sources], dict[str, Any]]] = {
    "gallery": gallery,
    "scores": scores,
    "training": training,
    "masks": masks,
    "rejects": rejects,
    "triplets": triplets,
    "similarity": similarity,
    "stages": stages,
}
