"""The scores (method, section 5), as functions of cosines and of rows of the scores table; see docs/metrics.md.

X-I(s) = mean over images g and real photos r of subject s of cos(phi(seg r), phi(seg g)), then the mean over s. CT is
the mean over editing prompts of cos(text, image), IR that of ImageReward, again by subject first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from eval.protocol.prompts import PAIR, PHOTO, RECONSTRUCTION
from runtime.params import Section

MissPolicy = Literal["zero", "skip", "unsegmented"]
Row = dict[str, Any]
Estimate = dict[str, float | None]
"""mean, with low and high, the ends of its confidence interval: null with only one subject."""

MODEL, PROMPT_ONLY, TRUTH, REAL, COPY = "customcontrast", "prompt_only", "truth", "real", "copy"
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
"""For each column of METRICS, the metric of the scores table and the part of the images it averages over."""

PICTURE = ("subject_id", "group", "prompt_id", "index")
"""Key of an image within a method."""


SAME = 1e-3
"""Difference of cosines that half precision cannot resolve."""


class IntervalParams(Section):
    """Confidence intervals of means for other subjects of the same kind: bootstrap over subjects (Efron 1979)."""

    resamples: int = Field(ge=1)  # each draws as many subjects as there are, with replacement
    level: float = Field(gt=0, lt=1)  # fraction of the resampled means between low and high
    seed: int


def mean_cosines(cosines: np.ndarray, compared: np.ndarray) -> np.ndarray:
    """Return each image's mean cosine to the photos it is compared with, [G]; NaN if there are none.

    cosines: [G, P] of images and photos. compared: bool [G, P].
    """
    return _masked_mean(cosines, compared)


def copy_excess(cosines: np.ndarray, photos: np.ndarray, shown: np.ndarray, compared: np.ndarray) -> np.ndarray:
    """Return how much closer each image is to its reference than to the subject's other photos, [G].

    (c(x, r) - mean c(x, others)) / (1 - mean c(r, others)), with r the nearest reference crop: 1 for a copy of the
    crop, 0 for an image that is no closer to it than to the others. NaN without a reference or without others, and
    where the crop is nearly identical to the others (SAME), as copying cannot be detected then.

    Args:
        cosines: [G, P] of images and photos.
        photos: [P, P] of the photos.
        shown: bool [G, P], the references of each image.
        compared: bool [G, P]; those that are not references are the others.
    """
    if not photos.size or not len(cosines):
        return np.full(len(cosines), np.nan)
    nearest = np.where(shown, cosines, -np.inf).argmax(axis=1)
    others = compared & ~shown
    own, copied = _masked_mean(cosines, others), _masked_mean(photos[nearest], others)
    defined = shown.any(axis=1) & (1 - copied > SAME)  # false for NaN
    excess = cosines[np.arange(len(cosines)), nearest] - own
    return np.divide(excess, 1 - copied, out=np.full(len(cosines), np.nan), where=defined)


def mean_to_siblings(distances: np.ndarray, siblings: Sequence[Any]) -> np.ndarray:
    """Return each image's mean distance to the other images of its prompt, [G]; NaN if it is the only one.

    distances: [G, G]. siblings: a key for each image, equal for images of one prompt.
    """
    keys = list(siblings)
    number = np.array([keys.index(key) for key in keys], dtype=int)
    return _masked_mean(distances, (number[:, None] == number) & ~np.eye(len(keys), dtype=bool))


def with_misses(values: Sequence[float | None], found: Sequence[bool], policy: MissPolicy) -> list[float | None]:
    """Return the similarities with the miss policy applied to images in which the subject was not found.

    `zero`: 0. `skip`: None, excluded from every mean. `unsegmented`: the value unchanged, which must then be of the
    whole image. None stays None: an undefined value does not count against an image.
    """
    if policy == "unsegmented":
        return list(values)
    missing = 0.0 if policy == "zero" else None
    return [value if hit or value is None else missing for value, hit in zip(values, found, strict=True)]


def subject_means(rows: Iterable[Row]) -> dict[str, float]:
    """Return the mean of the rows' values by subject_id; nulls are skipped, as are subjects with nothing else."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["value"] is not None:
            values.setdefault(row["subject_id"], []).append(row["value"])
    return {subject: float(np.mean(members)) for subject, members in sorted(values.items())}


def estimate(means: Sequence[float], intervals: IntervalParams) -> Estimate | None:
    """Return the mean of the subjects' means with its interval; None without subjects, no interval for one."""
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

    An Estimate (None if nothing was scored) for each column of METRICS; for each metric in its two parts in `metrics`
    ({metric: {"R": ..., "E": ...}}) and in each prompt group in `groups` ({group: {metric: ...}}); the mean of each
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
    """Return the `summary` of each method: the model, other methods by name, the oracles."""
    scored, segmented = _by_method(scores), _by_method(segmentations)
    order = {MODEL: -1, PROMPT_ONLY: 1, TRUTH: 2, REAL: 3, COPY: 4}
    methods = sorted(scored, key=lambda name: (order.get(name, 0), name))
    return {name: summary(scored[name], segmented.get(name, []), intervals) for name in methods}


def by_subject_group(
    scores: Sequence[Row],
    segmentations: Sequence[Row],
    groups: Mapping[str, Mapping[str, Sequence[str]]],
    intervals: IntervalParams,
) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Return the `summaries` of the subjects of each group alone: {column: {value: {method: ...}}}.

    groups: subject_ids by column and value, as `eval.score.groups.subject_groups` gives them.
    """

    def of(rows: Sequence[Row], subjects: Sequence[str]) -> list[Row]:
        wanted = set(subjects)
        return [row for row in rows if row["subject_id"] in wanted]

    return {
        column: {value: summaries(of(scores, ids), of(segmentations, ids), intervals) for value, ids in values.items()}
        for column, values in groups.items()
    }


def columns(values: dict[str, Any]) -> dict[str, Estimate | None]:
    """Return the columns of METRICS of a `summary`, then its other metrics with a value: R-<metric> and E-<metric>."""
    shown = set(HEADLINE.values())
    others = {
        f"{part}-{name}": found
        for name, parts in values["metrics"].items()
        for part, found in parts.items()
        if found is not None and (name, part) not in shown
    }
    return {column: values[column] for column in METRICS} | others


def position(value: Estimate | None, low: Estimate | None, high: Estimate | None) -> float | None:
    """Return where a score lies between two others, (value - low) / (high - low): 0 is `low`, 1 is `high`.

    None without one of the three, and unless `high` is clearly above `low`: by more than SAME, their intervals apart.
    """
    if value is None or low is None or high is None:
        return None
    score, bottom, top = (float(of["mean"] or 0.0) for of in (value, low, high))
    overlap = low["high"] is not None and high["low"] is not None and low["high"] >= high["low"]
    return round((score - bottom) / (top - bottom), 3) if top - bottom > SAME and not overlap else None


def positions(scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the `position` of each method between PROMPT_ONLY and TRUTH, from `summaries`; empty unless it has both.

    A position for each column of METRICS, and in `groups` ({group: {metric: ...}}) for its metrics in each prompt group
    of TRUTH's.
    """
    if PROMPT_ONLY not in scores or TRUTH not in scores:
        return {}
    low, high = scores[PROMPT_ONLY], scores[TRUTH]
    judged = dict.fromkeys(metric for metric, _ in HEADLINE.values())

    def in_group(group: str, metric: str, values: dict[str, Any]) -> float | None:
        return position(*(of["groups"].get(group, {}).get(metric) for of in (values, low, high)))

    return {
        method: {
            **{column: position(values[column], low[column], high[column]) for column in METRICS},
            "groups": {group: {name: in_group(group, name, values) for name in judged} for group in high["groups"]},
        }
        for method, values in scores.items()
        if method not in (PROMPT_ONLY, TRUTH)
    }


def _by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


PARTS: dict[str, Callable[[str], bool]] = {
    "R": lambda group: group in (RECONSTRUCTION, PHOTO),
    "E": lambda group: group not in (RECONSTRUCTION, PAIR),
}
"""Reconstruction and editing of one subject: the prompt groups that count in each. Pairs count in neither."""


def _in_group(rows: Iterable[Row], wanted: Callable[[str], bool]) -> list[Row]:
    return [row for row in rows if wanted(row["group"])]


def _masked_mean(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.where(counted, values, 0.0).sum(axis=1) / counted.sum(axis=1)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
