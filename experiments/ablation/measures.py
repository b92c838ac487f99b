"""Numbers of one measurement of a run, beside the columns of the published table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Read = Callable[[dict[str, Any]], float | None]
"""A measurement -> its number; None if it has none."""


def views(name: str) -> Read:
    """A measure of S+ over the views of subjects; None without S+."""
    return lambda one: (one["views"].get("s_plus") or {}).get(name)


def truth(part: str, name: str) -> Read:
    """A column of the comparison with the toybox's ground truth."""
    return lambda one: one["truth"][part][name]


def kept(one: dict[str, Any]) -> float:
    """Mean share of images in which the judge sees the subject's family, colour and pattern."""
    return float(np.mean(list(one["truth"]["kept"].values())))


def followed(one: dict[str, Any]) -> float:
    """Mean share of images in which the judge sees the scene, style, accessory or shape of the prompt."""
    return float(np.mean(list(one["truth"]["followed"].values())))


def excess(one: dict[str, Any]) -> float:
    """Share of images with their reference's pose, above chance."""
    pose = one["truth"]["pose"]
    return pose["same_pose"] - pose["chance"]


def outside(one: dict[str, Any]) -> float | None:
    """How much images differ from those of the prompt alone outside the subject."""
    return (one["truth"].get("outside") or {}).get("change")


def overlap_at(step: float) -> Read:
    """The overlap with the finished subject of the last location mask made up to a step; None if there was none."""

    def read(one: dict[str, Any]) -> float | None:
        known = {int(number): value for number, value in (one["truth"].get("overlap") or {}).items()}
        before = [number for number in known if number <= round(step)]
        return known[max(before)] if before else None

    return read


def overlap_rise(one: dict[str, Any]) -> float | None:
    """How much larger the overlap of the last location mask is than that of the first; None without masks."""
    known = [value for _, value in sorted((int(k), v) for k, v in (one["truth"].get("overlap") or {}).items())]
    return known[-1] - known[0] if known else None
