"""Ranking questions: is the query more similar to its own subject elsewhere than to another subject in its place?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.score.metrics import IntervalParams, estimate

ALL = "all"
"""A table row that every question counts in."""
AT_ONCE = 4096  # questions: 13 MB for each of three vectors of ViT-L


@dataclass(frozen=True)
class Question:
    """A photo (query), another photo of its subject (match) and one of another subject (rival).

    query, match, rival: indices of their vectors. rows: the table rows it counts in, besides ALL.
    """

    subject: str
    query: int
    match: int
    rival: int
    rows: tuple[str, ...]


def ranked(match: np.ndarray, rival: np.ndarray) -> np.ndarray:
    """Return 1 where the match has the higher value, 0 where the rival has, 0.5 for a tie; NaN where either is NaN."""
    return 0.5 + 0.5 * np.sign(match - rival)


def answers(vectors: np.ndarray, questions: Sequence[Question]) -> np.ndarray:
    """Return, for each question, `ranked` of the cosines of query and match, query and rival, [Q].

    vectors: unit vectors [N, d].
    """
    places = np.array([(q.query, q.match, q.rival) for q in questions], dtype=int).reshape(-1, 3)
    found = []
    for start in range(0, len(places), AT_ONCE):
        query, match, rival = (vectors[column] for column in places[start : start + AT_ONCE].T)
        found.append(ranked(*(np.einsum("qd,qd->q", query, other) for other in (match, rival))))
    return np.concatenate(found) if found else np.empty(0)


def table(
    subjects: Sequence[str],
    rows: Sequence[tuple[str, ...]],
    answered: Mapping[str, np.ndarray],
    intervals: IntervalParams,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Return the rows `names` of a table, which may contain ALL; those without a question are left out.

    Each is {row, subjects, questions, values: {metric: Estimate}}: the mean answer of each subject, then over subjects,
    with its bootstrap interval. NaN answers are left out.

    Args:
        subjects: of each question [Q]; those that differ are resampled independently.
        rows: that each question counts in [Q], besides ALL.
        answered: answers [Q] by metric.
    """
    found = []
    for name in names:
        members = [number for number, labels in enumerate(rows) if name == ALL or name in labels]
        if not members:
            continue
        means = {metric: _by_subject(subjects, values, members) for metric, values in answered.items()}
        found.append(
            {
                "row": name,
                "subjects": len({subjects[number] for number in members}),
                "questions": len(members),
                "values": {metric: estimate(values, intervals) for metric, values in means.items()},
            }
        )
    return found


def _by_subject(subjects: Sequence[str], values: np.ndarray, members: Sequence[int]) -> list[float]:
    of_each: dict[str, list[float]] = {}
    for number in members:
        if not np.isnan(values[number]):
            of_each.setdefault(subjects[number], []).append(float(values[number]))
    return [float(np.mean(found)) for _, found in sorted(of_each.items())]
