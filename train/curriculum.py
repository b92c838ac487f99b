"""Easy samples first, hard ones later: which view of the subject a step shows as reference, and how large.

RealCustom++ trains with such a curriculum. What is public says only that it mixes text-image and multi-view data so
that poses and sizes become diverse; shares, angles, sizes and times are a reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from runtime.params import Band, Section

CURRICULUM, PLACED = 4, 5
"""First elements of the seeds, beside those of `train.batches.sampler`."""

TOLERANCE = 1e-3
"""Degrees by which an angle may exceed the largest: poses are float32."""


class DifficultyParams(Section):
    """What the samples of a step are drawn from."""

    multi_view: float = Field(ge=0, le=1)  # share of samples whose reference is another photo than the target
    angle: float = Field(ge=0, le=180)  # degrees; largest between the viewing directions of the two
    scale: Band  # longer side of the subject in the reference, of the square

    @field_validator("scale")
    @classmethod
    def scale_is_a_share(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"{list(scale)} is not inside 0..1; give 0 < lower <= upper <= 1")
        return scale


class CurriculumParams(Section):
    """The course of a run."""

    schedule: Literal["none", "constant", "linear"]  # none: samples are those of the triplets; constant: always `end`
    span: Band  # of the run, 0..1: where `linear` moves from `start` to `end`
    start: DifficultyParams
    end: DifficultyParams

    @model_validator(mode="after")
    def lies_inside_the_run(self) -> Self:
        if not 0 <= self.span[0] <= self.span[1] <= 1:
            raise ValueError(f"span {list(self.span)} is not inside 0..1; give parts of the run")
        return self


@dataclass(frozen=True)
class Choice:
    """What the C samples of a batch show."""

    triplets: np.ndarray
    """[C] rows of the TrainingSet."""
    own: np.ndarray
    """[C] bool: the reference is the target's own photo."""
    scales: np.ndarray
    """[C] longer side of the subject in the reference, of the square."""


@dataclass(frozen=True)
class Curriculum:
    """The samples of each batch, a function of (seed, batch)."""

    params: CurriculumParams
    seed: int
    steps: int
    """Of the run."""
    accumulation: int
    """Batches per step."""

    @classmethod
    def of(cls, params: CurriculumParams, seed: int, steps: int, accumulation: int) -> Self | None:
        """The curriculum of a run, or None if it has none."""
        return None if params.schedule == "none" else cls(params, seed, steps, accumulation)

    def at(self, batch: int) -> DifficultyParams:
        """The difficulty of a 0-based batch."""
        start, end, (low, high) = self.params.start, self.params.end, self.params.span
        done = (batch // self.accumulation) / self.steps
        if self.params.schedule == "constant" or done >= high:
            return end
        if done <= low:
            return start
        share = (done - low) / (high - low)

        def between(before: float, after: float) -> float:
            return before + (after - before) * share

        scale = (between(start.scale[0], end.scale[0]), between(start.scale[1], end.scale[1]))
        return DifficultyParams(
            multi_view=between(start.multi_view, end.multi_view), angle=between(start.angle, end.angle), scale=scale
        )

    def choose(self, batch: int, triplets: list[np.ndarray], angles: np.ndarray) -> Choice:
        """The samples of a batch.

        So many samples as the share says, of those whose subject has a triplet within the largest angle, get one of
        these; the others a triplet of any angle, with the target's own photo as reference.

        Args:
            triplets: rows of each sample's subject, at least one.
            angles: of all rows, degrees between reference and target; NaN for a subject's only photo, and the largest
                of all, `end`'s, counts where no pose is known (infinite).
        """
        now, count = self.at(batch), len(triplets)
        rng = np.random.default_rng([self.seed, CURRICULUM, batch])
        picked, order, rounding, scales = rng.random(count), rng.permutation(count), rng.random(), rng.random(count)
        known = np.where(np.isinf(angles), self.params.end.angle, angles)
        near = [rows[known[rows] <= now.angle + TOLERANCE] for rows in triplets]
        own = np.ones(count, dtype=bool)
        own[[sample for sample in order if len(near[sample])][: int(now.multi_view * count + rounding)]] = False
        pools = [rows if alone else within for rows, within, alone in zip(triplets, near, own, strict=True)]
        chosen = [pool[int(share * len(pool))] for pool, share in zip(pools, picked, strict=True)]
        low, high = now.scale
        return Choice(np.array(chosen, dtype=np.int64), own, low + (high - low) * scales)

    def generator(self, batch: int, place: int) -> np.random.Generator:
        """Where the reference at one place of a batch is placed on its square."""
        return np.random.default_rng([self.seed, PLACED, batch, place])
