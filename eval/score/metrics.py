"""The scores (method, section 5), as functions of cosines and of rows of the scores table; see docs/metrics.md.

X-I(s) = mean over pictures g and real photos r of subject s of cos(phi(seg r), phi(seg g)), then the mean over s. CT is
the mean over editing prompts of cos(text, picture), IR that of ImageReward, again by subject first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from eval.protocol.prompts import PAIR, PHOTO, RECONSTRUCTION
from runtime.params import Section

MissPolicy = Literal["zero", "skip", "unsegmented"]
Row = dict[str, Any]
Estimate = dict[str, float | None]
"""mean, and low and high, the ends of its confidence interval: null where there is one subject only."""

MODEL, PROMPT_ONLY, REAL, COPY = "customcontrast", "prompt_only", "real", "copy"
METRICS = ("CT", "IR", "R-CI", "E-CI", "R-DI", "E-DI")
"""The columns of the published table."""

HEADLINE = {
    "CT": ("clip_t", "E"),
    "IR": ("reward", "E"),
    "R-CI": ("clip_i", "R"),
    "E-CI": ("clip_i", "E"),
    "R-DI": ("dino_i", "R"),
    "E-DI": ("dino_i", "E"),
}
"""The metric of the scores table and the part of the pictures that each column of METRICS is the mean of."""

PICTURE = ("subject_id", "group", "prompt_id", "index")
"""What a picture of a method is known by."""


SAME = 1e-3
"""Difference of cosines below which half precision sees no two pictures."""


class IntervalParams(Section):
    """How far a mean may be from that of other subjects of the same kind: bootstrap over subjects (Efron 1979)."""

    resamples: int = Field(ge=1)  # as many subjects as there are, drawn with replacement
    level: float = Field(gt=0, lt=1)  # share of the resampled means between low and high
    seed: int


def mean_cosines(cosines: np.ndarray, compared: np.ndarray) -> np.ndarray:
    """Return each picture's mean cosine to the photos it is compared with, [G]; NaN where there are none.

    cosines: [G, P] of pictures and photos. compared: bool [G, P].
    """
    return _masked_mean(cosines, compared)


def copy_excess(cosines: np.ndarray, photos: np.ndarray, shown: np.ndarray, compared: np.ndarray) -> np.ndarray:
    """Return how much nearer each picture is to what the model was shown than to the subject's other photos, [G].

    c(x, nearest shown crop r) - mean c(x, others), over what it is for r itself, 1 - mean c(r, others): 1 for a copy of
    the crop, 0 for a picture that is no nearer to it than to the others. NaN without a shown crop or without others,
    and where the crop is all but the others (SAME): nobody could tell then.

    Args:
        cosines: [G, P] of pictures and photos.
        photos: [P, P] of the photos.
        shown: bool [G, P], the photos that the model saw.
        compared: bool [G, P]; those of them that were not shown are the others.
    """
    if not photos.size or not len(cosines):
        return np.full(len(cosines), np.nan)
    nearest = np.where(shown, cosines, -np.inf).argmax(axis=1)
    others = compared & ~shown
    own, copied = _masked_mean(cosines, others), _masked_mean(photos[nearest], others)
    told = shown.any(axis=1) & (1 - copied > SAME)  # false for NaN
    excess = cosines[np.arange(len(cosines)), nearest] - own
    return np.divide(excess, 1 - copied, out=np.full(len(cosines), np.nan), where=told)


def mean_to_siblings(distances: np.ndarray, siblings: Sequence[Any]) -> np.ndarray:
    """Return each picture's mean distance to the other pictures of its prompt, [G]; NaN for the only one.

    distances: [G, G]. siblings: what pictures of one prompt have in common, a key for each picture.
    """
    keys = list(siblings)
    number = np.array([keys.index(key) for key in keys], dtype=int)
    return _masked_mean(distances, (number[:, None] == number) & ~np.eye(len(keys), dtype=bool))


def with_misses(values: Sequence[float | None], found: Sequence[bool], policy: MissPolicy) -> list[float | None]:
    """Return the similarities with what a picture counts in which the subject was not found.

    `zero`: 0. `skip`: None, it is left out of every mean. `unsegmented`: its value as it stands, which must then come
    from the whole picture. None stays None: what says nothing of a picture does not count against it.
    """
    if policy == "unsegmented":
        return list(values)
    missing = 0.0 if policy == "zero" else None
    return [value if hit or value is None else missing for value, hit in zip(values, found, strict=True)]


def subject_means(rows: Iterable[Row]) -> dict[str, float]:
    """Return, by subject_id, the mean of the rows' values; nulls are left out, and subjects with nothing else."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["value"] is not None:
            values.setdefault(row["subject_id"], []).append(row["value"])
    return {subject: float(np.mean(members)) for subject, members in sorted(values.items())}


def estimate(means: Sequence[float], intervals: IntervalParams) -> Estimate | None:
    """Return the mean over subjects of their means, with its interval; None without a subject, no interval of one."""
    if not means:
        return None
    low = high = None
    if len(means) > 1:
        draws = np.random.default_rng(intervals.seed).integers(len(means), size=(intervals.resamples, len(means)))
        ends = (0.5 - intervals.level / 2, 0.5 + intervals.level / 2)
        low, high = (round(float(end), 4) for end in np.quantile(np.asarray(means)[draws].mean(axis=1), ends))
    return {"mean": round(float(np.mean(means)), 4), "low": low, "high": high}


def summary(scores: Sequence[Row], segmentations: Sequence[Row], intervals: IntervalParams) -> dict[str, Any]:
    """Return the scores of one method from its rows of the tables scores and segmentations.

    An Estimate (None where nothing was scored) of each column of METRICS; of each metric in its two parts in `metrics`
    ({metric: {"R": ..., "E": ...}}) and in each group of prompts in `groups` ({group: {metric: ...}}); the mean of each
    subject in `subjects` ({subject_id: {metric: {"R": ..., "E": ...}}}, floats); counts: pictures, misses, miss_rate.
    """
    names = sorted({row["metric"] for row in scores})
    by_metric = {name: [row for row in scores if row["metric"] == name] for name in names}
    parts = {
        name: {part: subject_means(_in_group(rows, wanted)) for part, wanted in PARTS.items()}
        for name, rows in by_metric.items()
    }
    found = {
        name: {part: estimate(list(means.values()), intervals) for part, means in by_part.items()}
        for name, by_part in parts.items()
    }
    misses = sum(not row["segmented"] for row in segmentations)
    return {
        **{column: found.get(metric, {}).get(part) for column, (metric, part) in HEADLINE.items()},
        "metrics": found,
        "groups": {
            group: {
                name: estimate(list(subject_means(_in_group(rows, group.__eq__)).values()), intervals)
                for name, rows in by_metric.items()
            }
            for group in sorted({row["group"] for row in scores})
        },
        "subjects": {
            subject: {
                name: {part: _rounded(means.get(subject)) for part, means in by_part.items()}
                for name, by_part in parts.items()
            }
            for subject in sorted({row["subject_id"] for row in scores})
        },
        "pictures": len({tuple(row[key] for key in PICTURE) for row in scores}),
        "misses": misses,
        "miss_rate": round(misses / len(segmentations), 4) if segmentations else 0.0,
    }


def summaries(
    scores: Iterable[Row], segmentations: Iterable[Row], intervals: IntervalParams
) -> dict[str, dict[str, Any]]:
    """Return `summary` of each method: the model, other methods by name, the oracles."""
    scored, segmented = _by_method(scores), _by_method(segmentations)
    order = {MODEL: -1, PROMPT_ONLY: 1, REAL: 2, COPY: 3}
    methods = sorted(scored, key=lambda name: (order.get(name, 0), name))
    return {name: summary(scored[name], segmented.get(name, []), intervals) for name in methods}


def columns(values: dict[str, Any]) -> dict[str, Estimate | None]:
    """Return the columns of METRICS of a `summary`, then those of its other metrics that say something: R-<metric> and
    E-<metric>."""
    shown = set(HEADLINE.values())
    others = {
        f"{part}-{name}": found
        for name, parts in values["metrics"].items()
        for part, found in parts.items()
        if found is not None and (name, part) not in shown
    }
    return {column: values[column] for column in METRICS} | others


def _by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


PARTS: dict[str, Callable[[str], bool]] = {
    "R": lambda group: group in (RECONSTRUCTION, PHOTO),
    "E": lambda group: group not in (RECONSTRUCTION, PAIR),
}
"""Reconstruction and editing of one subject: which groups of prompts count in each. Pairs are apart."""


def _in_group(rows: Iterable[Row], wanted: Callable[[str], bool]) -> list[Row]:
    return [row for row in rows if wanted(row["group"])]


def _masked_mean(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.where(counted, values, 0.0).sum(axis=1) / counted.sum(axis=1)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
