"""Subjects that are one object: two captures of it share no picture, but their prototypes nearly agree."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

Repeats = dict[str, tuple[str, float]]


def same_subjects(ids: Sequence[str], pairs: np.ndarray, cosines: np.ndarray, test: Collection[str]) -> Repeats:
    """Return {subject to drop: (subject that it repeats, cosine)}.

    The second step after the hash: two captures of one object share no picture, but their prototypes nearly agree. Test
    subjects stay before those of training, earlier ids before later, and nothing goes for what has gone itself.

    Args:
        ids: of all subjects, sorted.
        pairs: [n, 2] places in `ids` of subjects as alike as one is to itself.
        cosines: [n] of their prototypes.
        test: ids of test subjects.
    """
    rank = {subject: (subject not in test, place) for place, subject in enumerate(ids)}
    named = [sorted((ids[a], ids[b]), key=rank.__getitem__) for a, b in pairs.tolist()]
    dropped: dict[str, tuple[str, float]] = {}
    for (stays, goes), cosine in sorted(
        zip(named, cosines.tolist(), strict=True), key=lambda row: [rank[subject] for subject in reversed(row[0])]
    ):  # by rank of what would go: whether the other stays is known by then
        if goes not in dropped and stays not in dropped:
            dropped[goes] = (stays, cosine)
    return dropped
