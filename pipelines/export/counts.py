"""What an export turned out to hold, counted from the exports table, and what the stages before it dropped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import tables
from pipelines.export.plan import Survey
from pipelines.export.records import AND
from pipelines.photos.licences import UNKNOWN

ANGLE_BIN = 15
"""Degrees of a row of the card's angles."""
STAGES = ("curate", "mask", "similarity", "pairs")


@dataclass
class ExportCounts:
    """Counts of an export.

    Attributes:
        pairs, subjects: by split; subjects as planned.
        classes, licences: pairs by class noun and by the licence of their photos.
        angles: pairs by the lower end of their angle's bin, degrees; None without poses.
        attributed: pairs of which it is known whom to name.
        left_out: triplets that make no pair, by reason.
        rejects: photos by stage and reason, of the stages before, and pairs that the export could not make.
        stages: input and kept of the stages before.
    """

    pairs: Counter[str] = field(default_factory=Counter)
    subjects: dict[str, int] = field(default_factory=dict)
    classes: Counter[str] = field(default_factory=Counter)
    angles: Counter[int | None] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    attributed: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    rejects: dict[tuple[str, str], int] = field(default_factory=dict)
    stages: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Path, out: Path, survey: Survey) -> ExportCounts:
        """Return the counts of the exports table in `out`, and of the stages in `data`. Memory holds one chunk."""
        found = cls(subjects=dict(survey.subjects), left_out=dict(sorted(survey.left_out.items())))
        columns = ["split", "class_name", "angle", "licence", "attribution"]
        for row in tables.rows(out, "exports", columns):
            found.pairs[row["split"]] += 1
            found.classes[row["class_name"]] += 1
            found.licences[row["licence"] or UNKNOWN] += 1
            found.attributed += row["attribution"] is not None
            found.angles[None if row["angle"] is None else int(row["angle"] // ANGLE_BIN) * ANGLE_BIN] += 1
        rejects = Counter[tuple[str, str]]()
        for folder in (data / "curate", data / "mask", data / "similarity", out):
            if (folder / "rejects").is_dir():
                rejects.update((row["stage"], row["reason"]) for row in tables.rows(folder, "rejects"))
        rejects.update(("mask", f"quality {flag}") for flag in _flags(data / "mask"))
        found.rejects = dict(sorted(rejects.items()))
        for stage in STAGES:
            metrics = data / stage / "metrics.json"
            if metrics.exists():
                values: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8"))
                found.stages[stage] = {name: value for name, value in values.items() if isinstance(value, int)}
        return found

    def credited(self) -> bool:
        """Whether the licence of some pair is known, or whom to name for it."""
        return self.attributed > 0 or any(name != UNKNOWN for name in self.licences)

    def single_licences(self) -> Counter[str]:
        """Return how many pairs have a photo under a licence, by licence."""
        counts = Counter[str]()
        for name, count in self.licences.items():
            counts.update(dict.fromkeys(name.split(AND), count))
        return counts

    def plain(self) -> dict[str, Any]:
        """Return the counts as JSON-like data."""
        rejects: dict[str, dict[str, int]] = {}
        for (stage, reason), count in self.rejects.items():
            rejects.setdefault(stage, {})[reason] = count
        angles = {UNKNOWN if low is None else str(low): count for low, count in self.angles.items()}
        return {
            "pairs": dict(self.pairs),
            "subjects": self.subjects,
            "classes": dict(self.classes),
            "angles": angles,
            "licences": dict(self.licences),
            "left_out": self.left_out,
            "dropped": rejects,
        }


def _flags(mask: Path) -> Iterator[str]:
    """Yield the flag of each mask that is not good."""
    for piece in tables.stream(mask, "masks", ["quality"]):
        yield from (flag for flag in piece["quality"].to_pylist() if flag != "ok")
