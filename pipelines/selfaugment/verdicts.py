"""Which pictures are kept: whether seeds agree on a name, and why a picture of someone known is rejected."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from pipelines.selfaugment.people import STYLE, SelfAugmentParams

MEASURES = ("frame_id", "group", "prompt", "face", "second_face", "cosine", "clip_t")
"""Columns of the pictures table that `verdicts` reads."""

Vector = np.ndarray[Any, np.dtype[np.float32]]


def agreement(faces: Sequence[Vector | None]) -> float:
    """Return the mean cosine of the pairs of unit vectors [e]; a picture without a face agrees with none."""
    pairs = [0.0 if a is None or b is None else float(a @ b) for a, b in combinations(faces, 2)]
    return float(np.mean(pairs))


def mean_face(faces: Iterable[Vector | None]) -> Vector | None:
    """Return the unit vector of the mean of those that are there; None if none is."""
    found = [face for face in faces if face is not None]
    if not found:
        return None
    mean = np.mean(found, axis=0)
    unit: Vector = mean / np.linalg.norm(mean)
    return unit


def verdicts(rows: Sequence[Mapping[str, Any]], params: SelfAugmentParams) -> dict[str, tuple[str, str]]:
    """Return {frame_id: (reason, measured value)} of the pictures to reject.

    The bar of CLIP-T is that of all pictures of a prompt, not of those that pass the rules before: a stricter rule
    then keeps a part of what a looser one keeps.

    Args:
        rows: MEASURES of all pictures that were made.
    """
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_prompt[row["prompt"]].append(row["clip_t"])
    bars = {
        prompt: float(np.quantile(values, params.clip_t_quantile, method="lower"))
        for prompt, values in by_prompt.items()
    }
    found = {row["frame_id"]: verdict(row, bars[row["prompt"]], params) for row in rows}
    return {frame_id: reason for frame_id, reason in found.items() if reason is not None}


def verdict(row: Mapping[str, Any], bar: float, params: SelfAugmentParams) -> tuple[str, str] | None:
    """Return the first rule that a picture breaks, with the measured value; None if it is kept."""
    least = params.min_cosine_style if row["group"] == STYLE else params.min_cosine
    if row["face"] is None or row["face"] < params.min_detection:
        return "no_face", f"{row['face'] or 0.0:.3f}"
    if row["second_face"] >= params.second_face:
        return "several_faces", f"{row['second_face']:.3f}"
    if row["cosine"] is None or row["cosine"] < least:
        return "another_person", f"{row['cosine'] or 0.0:.3f}"
    if row["clip_t"] < bar:
        return "prompt_missed", f"{row['clip_t']:.3f} < {bar:.3f}"
    return None
