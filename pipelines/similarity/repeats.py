"""Repeated subjects: two captures of one object share no image, but their prototypes nearly agree."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

Repeats = dict[str, tuple[str, float]]


def same_subjects(ids: Sequence[str], pairs: np.ndarray, cosines: np.ndarray, test: Collection[str]) -> Repeats:
    """Return {subject to drop: (subject that it repeats, cosine)}.

    The second check, after the hash: two captures of one object share no image, but their prototypes nearly agree. Test
    subjects take precedence over training subjects, earlier ids over later. No subject is dropped for repeating a
    dropped one.

    Args:
        ids: of all subjects, sorted.
        pairs: [n, 2] indices into `ids` of subjects as similar as one is to itself.
        cosines: [n] of their prototypes.
        test: ids of test subjects.
    """
    rank = {subject: (subject not in test, place) for place, subject in enumerate(ids)}
    named = [sorted((ids[a], ids[b]), key=rank.__getitem__) for a, b in pairs.tolist()]
    dropped: dict[str, tuple[str, float]] = {}
    for (kept, repeat), cosine in sorted(
        zip(named, cosines.tolist(), strict=True), key=lambda row: [rank[subject] for subject in reversed(row[0])]
    ):  # by rank of the one to drop: whether the other is kept is known by then
        if repeat not in dropped and kept not in dropped:
            dropped[repeat] = (kept, cosine)
    return dropped
