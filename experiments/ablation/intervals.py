"""Differences between runs, with intervals over seeds and subjects together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.ablation.experiment import OWN, Result

RESAMPLES, LEVEL, SEED = 4000, 0.95, 0
Values = NDArray[np.float64]
Statistic = Callable[[NDArray[np.int64], NDArray[np.int64]], float]
"""(places of seeds, places of subjects), each possibly repeated -> a number."""


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its interval."""

    value: float
    low: float
    high: float
    seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes 0, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def estimate(statistic: Statistic, seeds: int, subjects: int) -> Estimate:
    """A statistic with its bootstrap interval: seeds and subjects are both drawn with replacement (Efron 1979).

    With one seed the interval is over subjects alone. Three seeds drawn with replacement vary less than three new ones:
    the interval is somewhat too narrow for other seeds.
    """
    draw = np.random.default_rng(SEED)
    found = [
        statistic(draw.integers(seeds, size=seeds), draw.integers(subjects, size=subjects)) for _ in range(RESAMPLES)
    ]
    low, high = np.nanquantile(found, (0.5 - LEVEL / 2, 0.5 + LEVEL / 2))
    return Estimate(statistic(np.arange(seeds), np.arange(subjects)), float(low), float(high), seeds)


def difference(mine: Values, theirs: Values) -> Estimate:
    """Mean of mine - theirs, both [seeds, subjects] of the same seeds and subjects; NaN is left out."""
    change = mine - theirs
    return estimate(lambda seeds, subjects: mean(change[np.ix_(seeds, subjects)]), *change.shape)


def mean(values: Values) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def at_equal_control(mine: Sequence[tuple[Values, Values]], theirs: Sequence[tuple[Values, Values]]) -> Estimate:
    """Difference in similarity between two methods where both have the same controllability.

    Args:
        mine, theirs: (controllability, similarity) at each operating point, [seeds, subjects]; the first is the
            method's own setting.

    The controllability is the mean of the two methods' own, as far as both curves reach it. A curve is linear between
    its points, of which those count that no other point exceeds in both.
    """
    seeds, subjects = mine[0][0].shape

    def statistic(of_seeds: NDArray[np.int64], of_subjects: NDArray[np.int64]) -> float:
        cells = np.ix_(of_seeds, of_subjects)
        curves = [[tuple(mean(values[cells]) for values in point) for point in each] for each in (mine, theirs)]
        level = float(np.mean([curve[0][0] for curve in curves]))
        level = min(level, *(max(control for control, _ in curve) for curve in curves))
        return similarity_at(level, curves[0]) - similarity_at(level, curves[1])

    return estimate(statistic, seeds, subjects)


def similarity_at(level: float, curve: Sequence[Any]) -> float:
    """Similarity at a controllability on a curve of (controllability, similarity); at its ends that of the ends."""
    front: list[Any] = []
    for point in sorted(curve, reverse=True):  # from the highest controllability down
        if not front or point[1] > front[-1][1]:
            front.append(point)
    controls, similarities = zip(*reversed(front), strict=True)
    return float(np.interp(level, controls, similarities))


@dataclass(frozen=True)
class Measured:
    """The results of one run, by seed."""

    results: Sequence[Result]

    @property
    def seeds(self) -> list[int]:
        return [result["seed"] for result in self.results]

    def only(self, seeds: Sequence[int]) -> Measured:
        """Those of some seeds."""
        return Measured([result for result in self.results if result["seed"] in seeds])

    def complete(self, samples: int, point: str = OWN) -> Measured:
        """Those that were measured there."""
        return Measured([result for result in self.results if find(result, samples, point) is not None])

    def along(self, counts: Sequence[int]) -> Measured:
        """Those that were measured after each number of samples."""
        found = self
        for count in counts:
            found = found.complete(count)
        return found

    def at_points(self, samples: int, points: Sequence[str]) -> Measured:
        """Those that were measured at each of `points`."""
        found = self
        for point in points:
            found = found.complete(samples, point)
        return found

    def values(self, column: str, samples: int, point: str = OWN) -> Values:
        """[seeds, subjects] of a column of the published table, subjects by name; NaN where nothing was scored."""
        rows = []
        for result in self.results:
            by_subject = require(result, samples, point)["scores"][column]
            rows.append([np.nan if by_subject[name] is None else by_subject[name] for name in sorted(by_subject)])
        return np.asarray(rows, dtype=float)

    def numbers(self, read: Callable[[dict[str, Any]], float | None], samples: int, point: str = OWN) -> list[float]:
        """What `read` finds in each seed's measurement, where it finds something."""
        found = (read(require(result, samples, point)) for result in self.results)
        return [value for value in found if value is not None]


def find(result: Result, samples: int, point: str) -> dict[str, Any] | None:
    """The measurement of a result after so many samples at a point."""
    for one in result["measured"]:
        if (one["samples"], one["point"]) == (samples, point):
            return one
    return None


def require(result: Result, samples: int, point: str) -> dict[str, Any]:
    """As `find`, where the measurement is known to exist."""
    found = find(result, samples, point)
    assert found is not None, f"{result['run']}-{result['seed']} has no measurement at {samples}, {point}"
    return found


def paired(mine: Measured, theirs: Measured, samples: int, point: str = OWN) -> tuple[Measured, Measured]:
    """Two runs' results of the seeds that both were measured with."""
    mine, theirs = mine.complete(samples, point), theirs.complete(samples, point)
    return mine.only(theirs.seeds), theirs.only(mine.seeds)
