"""How often an epoch draws the subjects of each source: `train.mixture`.

Weights are shares of the samples. Over the whole set an epoch is as long as without them: of N subjects, N_s of
source s with share w_s, each subject of s is due N w_s / N_s times. That number is the same in every similarity
group; the counts due in a group are rounded to whole subjects there, so that its batches are full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from runtime.errors import UserError


@dataclass(frozen=True)
class Portion:
    """One similarity group's contribution to an epoch.

    Attributes:
        members: drawn subjects of the group, by source.
        places: samples of the epoch per source; their sum is a multiple of the batch.
    """

    members: list[np.ndarray]
    places: list[int]

    def batches(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """Subjects [batches, size] of an epoch, none twice in a batch: the counts of a source's subjects differ by at
        most one, and which subjects get the extra one is drawn again each epoch."""
        counts = [
            share_out(count, len(subjects), rng) for subjects, count in zip(self.members, self.places, strict=True)
        ]
        subjects, times = np.concatenate(self.members), np.concatenate(counts)
        order = rng.permutation(len(subjects))
        # Copies of a subject are adjacent and dealt to neighbouring batches, so no batch gets two of them.
        dealt = np.repeat(subjects[order], times[order])
        return dealt.reshape(size, -1).T


def share_out(places: int, subjects: int, rng: np.random.Generator) -> np.ndarray:
    """Count of each of `subjects` [subjects], `places` in total; who gets the remainder of the division is drawn."""
    each, rest = divmod(places, subjects)
    times = np.full(subjects, each, dtype=np.int64)
    times[rng.permutation(subjects)[:rest]] += 1
    return times


def apportion(due: Sequence[Fraction], places: int) -> list[int]:
    """Whole numbers in proportion to `due` that add up to `places`, each within 1 of its exact share.

    The largest remainders are rounded up (Hamilton's method), earlier ones first among equals.
    """
    total = sum(due)
    exact = [part * places / total for part in due]
    found = [int(part) for part in exact]
    order = sorted(range(len(due)), key=lambda n: (found[n] - exact[n], n))
    for n in order[: places - sum(found)]:
        found[n] += 1
    return found


def portions(
    groups: Sequence[np.ndarray], source_of: np.ndarray, names: Sequence[str], mixture: Mapping[str, float], batch: int
) -> list[Portion]:
    """Contribution of each of `groups` (arrays of subjects) to an epoch with batches of `batch` subjects.

    `source_of`: [subjects] index in `names` of each subject's source. A group too small for a batch contributes
    nothing.

    Raises:
        UserError: the mixture's sources do not match the data's, or a share needs a subject twice in a batch.
    """
    require_sources(names, mixture)
    totals = [sum(int((source_of[group] == source).sum()) for group in groups) for source in range(len(names))]
    weights = [Fraction(mixture[name]) for name in names]
    # A source without a subject in any group cannot have its share.
    drawn = sum((weight for weight, count in zip(weights, totals, strict=True) if count), Fraction(0))
    found = []
    for group in groups:
        members = [group[source_of[group] == source] for source in range(len(names))]
        used = [s for s in range(len(names)) if len(members[s]) and weights[s]]
        due = [len(members[s]) * weights[s] / drawn * sum(totals) / totals[s] for s in used]
        rounds = int(sum(due, Fraction(0)) // batch)
        if not rounds:
            continue
        places = apportion(due, rounds * batch)
        for source, count in zip(used, places, strict=True):
            if count > rounds * len(members[source]):
                raise UserError(
                    f"train.mixture: source '{names[source]}' has {len(members[source])} subjects in a similarity group"
                    f" and a share of {count} of {rounds * batch} samples there, which puts a subject twice in a batch"
                    f" of {batch}; lower its weight or train.batch"
                )
        kept = [(members[s], count) for s, count in zip(used, places, strict=True) if count]
        found.append(Portion([subjects for subjects, _ in kept], [count for _, count in kept]))
    return found


def require_sources(names: Sequence[str], mixture: Mapping[str, float]) -> None:
    """Raise UserError unless `mixture` names exactly the sources `names`."""
    there = ", ".join(names)
    for name in mixture:
        if name not in names:
            raise UserError(f"train.mixture names source '{name}', but the triplets are from {there}; correct its name")
    for name in names:
        if name not in mixture:
            raise UserError(f"train.mixture has no weight for source '{name}'; add one (0 leaves the source out)")
