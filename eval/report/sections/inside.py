"""Training losses and probes: location maps of each step, S+ across subjects and views."""

from __future__ import annotations

import csv
import io
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.report import charts
from eval.report.album import inline
from eval.report.sections.base import Missing, Sources, images, made, need, read_json
from eval.score.metrics import MODEL
from model.images.overlay import heated
from pipelines import tables
from runtime.errors import UserError

LOSSES = {
    "total": "weighted sum",
    "diffusion": "diffusion: noise prediction error",
    "cscl": "CSCL: visual vs textual tokens",
    "macl": "MACL: contrast between subjects, scaled by similarity",
    "location": "location: attention on the subject, goes below 0",
}
MAP_COLUMNS = ("subject_id", "frame_id", "level", "x", "y")
NAMED = 12  # at most this many subjects are labelled on a map


def training(sources: Sources) -> dict[str, Any]:
    """One curve per loss."""
    file = sources.data / "train" / "losses.csv"
    rows = _read_csv(file, "train", ("step",))
    columns = [name for name in LOSSES if name in rows[0]]
    if not columns:
        raise UserError(f"{file} has none of the columns {', '.join(LOSSES)}; run the train stage again")
    values = {name: _numbers(file, "train", rows, name) for name in ("step", *columns)}
    curves = [
        {
            "title": LOSSES[name],
            "last": float(np.mean(values[name][-max(1, len(rows) // 20) :])),
            "svg": charts.curve(values["step"], values[name], f"loss-{name}"),
        }
        for name in columns
    ]
    return {"curves": curves, "steps": int(max(values["step"]))}


def location(sources: Sources) -> dict[str, Any]:
    """Images overlaid with the location maps of some steps."""
    folder = need(sources.data, "location", "location_masks")
    rows = tables.read(folder, "location_masks").to_pylist()
    by_key = {row_key(row): row for row in made(sources.data) if row["method"] == MODEL}
    shown = [(key, list(members)) for key, members in groupby(rows, key=row_key) if key in by_key]
    pngs = images(sources.data, {(MODEL, *key) for key, _ in shown})
    pictures = []
    for key, members in shown:
        picture = Image.open(io.BytesIO(pngs[(MODEL, *key)])).convert("RGB")
        pictures.append(
            {
                "prompt": by_key[key]["prompt"],
                "image": inline(picture, sources.params.side),
                "steps": [
                    {
                        "step": row["step"],
                        "timestep": row["timestep"],
                        "image": inline(heated(picture, location_map(row)), sources.params.side),
                    }
                    for row in members
                ],
            }
        )
    return {"pictures": pictures}


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the key of an image of the model."""
    return (row["subject_id"], row["group"], row["prompt_id"], row["index"])


def location_map(row: dict[str, Any]) -> np.ndarray:
    """Return the map of a row of the location_masks table, [height, width] in 0..1."""
    return np.frombuffer(row["map"], np.uint8).reshape(row["height"], row["width"]) / 255


def views(sources: Sources) -> dict[str, Any]:
    """t-SNE maps of S+ at some levels, coloured by subject, shaped by view, and their metrics."""
    folder = sources.data / "views"
    measured = read_json(folder / "metrics.json", "views")
    file = folder / "map.csv"
    rows = _read_csv(file, "views", MAP_COLUMNS, may_be_empty=True)
    nouns = dict(
        zip(
            *(tables.read(folder, "view_tokens", [name])[name].to_pylist() for name in ("subject_id", "class_name")),
            strict=True,
        )
    )
    maps = []
    by_level = groupby(sorted(rows, key=lambda row: int(row["level"])), key=lambda row: int(row["level"]))
    for level, group in by_level:
        members = list(group)
        places = np.array([_numbers(file, "views", members, name) for name in ("x", "y")]).T
        subjects = [row["subject_id"] for row in members]
        seen: dict[str, int] = {}
        marks = []
        for subject in subjects:
            seen[subject] = seen.get(subject, -1) + 1
            marks.append(seen[subject])
        several = len({nouns.get(s) for s in seen}) < len(seen)
        labels = [s.rpartition("/")[2] if several else nouns.get(s, s) for s in subjects]
        name = f"level {level + 1} of {measured['level_count']}"
        maps.append(
            {
                "name": name,
                "silhouette": measured["levels"][str(level)]["silhouette_subject"],
                "svg": charts.flat_map(places, labels, marks, len(seen) <= NAMED, f"map-{level}"),
            }
        )
    of = [("image features (adapter input)", measured["image_encoder"]), ("S+, all levels", measured["s_plus"])]
    of += [
        (f"S+, level {int(level) + 1} of {measured['level_count']}", values)
        for level, values in sorted(measured["levels"].items(), key=lambda item: int(item[0]))
    ]
    return {
        "maps": maps,
        "rows": [{"name": name, **values} for name, values in of if values],
        **{name: measured[name] for name in ("photos", "subjects", "timestep")},
    }


def _read_csv(file: Path, stage: str, columns: tuple[str, ...], may_be_empty: bool = False) -> list[dict[str, str]]:
    if not file.is_file():
        raise Missing(stage)
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
    if set(columns) - set(reader.fieldnames or ()) or not (rows or may_be_empty):
        raise UserError(f"{file} has no rows with the columns {', '.join(columns)}; run the {stage} stage again")
    return rows


def _numbers(file: Path, stage: str, rows: list[dict[str, str]], name: str) -> list[float]:
    try:
        return [float(row[name]) for row in rows]
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} has a value that is not a number ({error}); run the {stage} stage again") from None
