"""The scores (method, section 5), as functions of unit vectors and of rows of the scores table.

X-I(s) = mean over pictures g and real photos r of subject s of cos(phi(seg r), phi(seg g)), then the mean over s. CT is
the mean over editing prompts of cos(text, picture), again by subject first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from eval.protocol import PAIR, RECONSTRUCTION

MissPolicy = Literal["zero", "skip", "unsegmented"]
Row = dict[str, Any]

MODEL, REAL, COPY = "customcontrast", "real", "copy"
PHOTO = "photo"
"""Group of the real photos: made from no prompt, they stand in both the reconstruction and the editing columns."""

METRICS = ("CT", "R-CI", "E-CI", "R-DI", "E-DI")
_COLUMN = {"CT": "clip_t", "CI": "clip_i", "DI": "dino_i"}


def mean_cosines(pictures: np.ndarray, photos: np.ndarray) -> np.ndarray:
    """Return each picture's mean cosine to the photos, [G]; unit vectors pictures [G, d], photos [P, d], P >= 1."""
    return (pictures @ photos.T).mean(axis=1)


def mean_cosines_to_others(photos: np.ndarray) -> np.ndarray:
    """Return each photo's mean cosine to the other photos, [P]; unit vectors [P, d]. A single photo has none: NaN."""
    count = len(photos)
    if count < 2:
        return np.full(count, np.nan)
    cosines = photos @ photos.T
    return (cosines.sum(axis=1) - np.diagonal(cosines)) / (count - 1)


def with_misses(values: Sequence[float], found: Sequence[bool], policy: MissPolicy) -> list[float | None]:
    """Return the similarities with what a picture counts in which the subject was not found.

    `zero`: 0. `skip`: None, it is left out of every mean. `unsegmented`: its value as it stands, which must then come
    from the whole picture.
    """
    if policy == "unsegmented":
        return list(values)
    missing = 0.0 if policy == "zero" else None
    return [value if hit else missing for value, hit in zip(values, found, strict=True)]


def subject_mean(rows: Iterable[Row], column: str) -> float | None:
    """Return the mean over subjects of the mean over a subject's pictures; nulls are left out, None where all are."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row[column] is not None:
            values.setdefault(row["subject_id"], []).append(row[column])
    if not values:
        return None
    return float(np.mean([np.mean(members) for members in values.values()]))


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the scores of one method: the five of METRICS, counts, and CT, CI, DI of each group of prompts."""
    rebuilt, edited = _in_group(rows, _is_reconstruction), _in_group(rows, _is_editing)
    result: dict[str, Any] = {"CT": _rounded(subject_mean(edited, "clip_t"))}
    for prefix, members in (("R", rebuilt), ("E", edited)):
        for metric in ("CI", "DI"):
            result[f"{prefix}-{metric}"] = _rounded(subject_mean(members, _COLUMN[metric]))
    result["subjects"] = len({row["subject_id"] for row in rows})
    result["pictures"] = len(rows)
    result["misses"] = sum(not row["segmented"] for row in rows)
    result["groups"] = {
        group: {
            metric: _rounded(subject_mean(_in_group(rows, group.__eq__), column)) for metric, column in _COLUMN.items()
        }
        for group in sorted({row["group"] for row in rows})
    }
    return result


def summaries(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return `summary` of each method, the model first, then the oracles."""
    order = {method: rank for rank, method in enumerate((MODEL, REAL, COPY))}
    methods = sorted({row["method"] for row in rows}, key=lambda name: (order.get(name, len(order)), name))
    return {method: summary([row for row in rows if row["method"] == method]) for method in methods}


def _is_reconstruction(group: str) -> bool:
    return group in (RECONSTRUCTION, PHOTO)


def _is_editing(group: str) -> bool:
    return group not in (RECONSTRUCTION, PAIR)


def _in_group(rows: Iterable[Row], wanted: Callable[[str], bool]) -> list[Row]:
    return [row for row in rows if wanted(row["group"])]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
