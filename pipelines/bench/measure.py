"""A benchmark's lines, and how rates are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from params import BackbonesParams, RunParams, Section, load
from pipelines.curate import CurateParams
from pipelines.mask import MaskParams
from pipelines.similarity import SimilarityParams


class Sizes(Section):
    """How much is measured; the fields are options of the command."""

    repeats: int  # the median counts
    photos: int  # for decode, workers and others
    side: int  # px, longer side of those photos
    source: str | None  # folder in MVImgNet's layout to take photos from instead of drawing them
    model_photos: int  # for mask and embed, at the resolution of the variant
    subjects: int  # for tile
    width: int  # of an embedding, for tile
    shards: int  # for engine
    rows: tuple[int, ...]  # for scale: frames, in rising order
    work: Path  # folder of photos and tables of the benchmark


@dataclass(frozen=True)
class Setting:
    """What a part of the benchmark is given: sizes, and the stages' own params."""

    sizes: Sizes
    run: RunParams
    variant: str
    curate: CurateParams
    mask: MaskParams
    similarity: SimilarityParams

    @classmethod
    def of(cls, sizes: Sizes) -> Setting:
        """Return the setting of this command line."""
        return cls(
            sizes,
            load("run", RunParams),
            load("backbones", BackbonesParams).variant,
            load("curate", CurateParams),
            load("mask", MaskParams),
            load("similarity", SimilarityParams),
        )


@dataclass(frozen=True)
class Line:
    """One figure: a ratio against a goal, or a figure without one.

    Attributes:
        most: whether the goal is the most allowed and not the least.
        detail: what the figure was made from.
    """

    name: str
    value: float
    goal: float | None = None
    most: bool = False
    detail: str = ""

    @property
    def short(self) -> bool:
        """Whether there is a goal and it is missed."""
        return self.goal is not None and (self.value > self.goal if self.most else self.value < self.goal)

    def __str__(self) -> str:
        goal = "-" if self.goal is None else f"{'<=' if self.most else '>='} {self.goal:g}"
        verdict = "" if self.goal is None else "short" if self.short else "ok"
        return f"{self.name:34} {self.value:10.3f}  {goal:>9}  {verdict:5}  {self.detail}".rstrip()


def seconds(work: Callable[[], Any]) -> float:
    """Return how long `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(
    name: str, ours: Callable[[], Any], bare: Callable[[], Any], count: int, unit: str, goal: float, repeats: int
) -> Line:
    """Return the rate of `ours` over the rate of `bare`, both over the same `count` of `unit`s.

    Both run in turns, so that other work on the machine meets both, and the median of the ratios counts. The first turn
    warms up and does not.
    """
    turns = [(seconds(ours), seconds(bare)) for _ in range(repeats + 1)][1:]
    mine, theirs = (statistics.median(column) for column in zip(*turns, strict=True))
    detail = f"{count / mine:.0f} of {count / theirs:.0f} {unit}s/s, {count} {unit}s"
    return Line(name, statistics.median(other / own for own, other in turns), goal, detail=detail)
