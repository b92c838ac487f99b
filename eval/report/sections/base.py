"""Shared by all sections of the report: its settings, its sources, images and scores by key."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from eval.protocol import protocol
from eval.report.album import Album, present
from eval.score.metrics import COPY, MODEL, PROMPT_ONLY, REAL, TRUTH, IntervalParams, Row, summaries
from pipelines import tables
from runtime.errors import UserError
from runtime.params import Section
from runtime.stages import stages

STAGES = tuple(stage.name for stage in stages().values() if stage.metrics)
ORACLES = (PROMPT_ONLY, TRUTH, REAL, COPY)
NAMES = {
    MODEL: "CustomContrast",
    PROMPT_ONLY: "prompt only",
    TRUTH: "oracle: true renders",
    REAL: "oracle: real photos",
    COPY: "oracle: copied photo",
}
"""Display names of methods; others are shown as in the tables."""
TITLES = {
    "clip_t": "CLIP-T: prompt fidelity",
    "reward": "ImageReward: prompt fidelity and preference",
    "clip_i": "CLIP-I: subject fidelity",
    "dino_i": "DINO-I: subject fidelity",
}
"""The metrics with charts; the others are in tables."""
PICTURE = ("method", "subject_id", "group", "prompt_id", "index")
READ_AT_ONCE = 64  # images of 512 px: 30 MB
Key = tuple[Any, ...]
"""The columns PICTURE of an image."""


class ReportParams(Section):
    """How much the page shows; none of it changes a score."""

    title: str
    side: int = Field(ge=16)  # px; larger images are scaled down to it
    subjects: int  # held-out subjects in the image grid
    pictures: int = Field(ge=1)  # generations of each of them
    ranked_by: tuple[str, ...]  # metrics by which the best, median and worst of a group are chosen
    picks: int = Field(ge=1)  # images of each of the three
    side_by_side: int  # prompts shown for all methods
    misses: int  # images in which the subject was not found
    masks: int  # photos with outlined masks, of each method
    triplets: int
    heat_map: int = Field(ge=1)  # subjects on a side of the similarity map
    neighbours: int  # subjects shown with the most similar others
    rejects: int  # examples of each reason


class Missing(Exception):
    """A stage has not run; the message is its name."""


@dataclass(frozen=True)
class Sources:
    """Inputs of the sections: the folder of the tables, the photos, the limits."""

    data: Path
    album: Album
    params: ReportParams


def need(data: Path, stage: str, table: str) -> Path:
    """Return the stage's folder if it holds the table."""
    if not present(data / stage, table):
        raise Missing(stage)
    return data / stage


def read_json(file: Path, stage: str) -> dict[str, Any]:
    """Return the content of a JSON file written by `stage`."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Missing(stage) from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); run the {stage} stage again") from None


def key_of(row: Row) -> Key:
    """Return the key of an image, from a row of the tables generations, scores or segmentations."""
    return tuple(row[name] for name in PICTURE)


def made(data: Path) -> list[Row]:
    """Return the rows of the generations table without the image column, in its order.

    `reference_known` is added; in place of an unknown reference stands the subject's first photo with a usable mask.
    """
    folder = need(data, "generate", "generations")
    columns = [name for name in tables.spec("generations").columns if name != "image"]
    rows = tables.read(folder, "generations", columns).to_pylist()
    photos = {}
    if not all(row["reference"] for row in rows) and present(data / "curate", "frames"):
        for subject in protocol.held_out(data):
            usable = [photo.frame_id for photo in subject.photos if photo.quality == "ok"]
            photos[subject.subject_id] = next(iter(usable), "")
    return [
        row
        | {
            "reference": row["reference"] or photos.get(row["subject_id"], ""),
            "reference_known": bool(row["reference"]),
        }
        for row in rows
    ]


def imported(data: Path) -> dict[str, Any]:
    """Return what is recorded of the methods whose images were made elsewhere, by name."""
    file = data / "generate" / "protocol.json"
    found: dict[str, Any] = read_json(file, "generate").get("imported", {}) if file.is_file() else {}
    return found


def images(data: Path, keys: Collection[Key]) -> dict[Key, bytes]:
    """Return the PNGs of those images, reading the table in small batches."""
    wanted, found = set(keys), {}
    for batch in tables.batches(data / "generate", "generations", [*PICTURE, "image"], READ_AT_ONCE):
        places = zip(*(batch[name].to_pylist() for name in PICTURE), strict=True)
        for number, key in enumerate(places):
            if key in wanted:
                found[key] = batch["image"][number].as_py()
    return found


def scores_by_picture(data: Path) -> dict[Key, dict[str, float | None]]:
    """Return {metric: value} of each image; empty if the score stage has not run."""
    found: dict[Key, dict[str, float | None]] = {}
    if present(data / "score", "scores"):
        for row in tables.rows(data / "score", "scores"):
            found.setdefault(key_of(row), {})[row["metric"]] = row["value"]
    return found


def missed(data: Path) -> dict[Key, float | None]:
    """Return the score of the best detection (None without one) of each image whose subject was not found."""
    if not present(data / "score", "segmentations"):
        return {}
    columns = [*PICTURE, "segmented", "score"]
    rows = tables.rows(data / "score", "segmentations", columns)
    return {key_of(row): row["score"] for row in rows if not row["segmented"]}


def scored(data: Path) -> dict[str, dict[str, Any]]:
    """Return `metrics.summaries` of the score stage's tables, with its interval settings."""
    folder = need(data, "score", "scores")
    segmentations = tables.read(folder, "segmentations", [*PICTURE, "segmented"]).to_pylist()
    return summaries(tables.read(folder, "scores").to_pylist(), segmentations, intervals(folder))


def intervals(folder: Path) -> IntervalParams:
    """Return the interval settings of the score stage that wrote `folder`."""
    file = folder / "protocol.json"
    found = read_json(file, "score").get("intervals")
    if found is None:
        raise UserError(f"{file} has no key 'intervals'; run the score stage again")
    return IntervalParams.model_validate(found)


def main_method(methods: Iterable[str]) -> str:
    """Return the method that the page is about: the model, or the first by name that is no oracle if it is not there.

    Without any, it is the model.
    """
    found = set(methods)
    others = sorted(found - {*ORACLES})
    return others[0] if others and MODEL not in found else MODEL


def name_of(method: str) -> str:
    """Return the display name of a method."""
    return NAMES.get(method, method)


def equally_spaced(items: Iterable[Any], count: int) -> list[Any]:
    """Return `count` of the items, evenly spaced from first to last; all if there are no more."""
    members = list(items)
    if len(members) <= count:
        return members
    if count < 2:
        return members[:count]
    return [members[place] for place in np.rint(np.linspace(0, len(members) - 1, count)).astype(int)]
