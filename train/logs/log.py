"""Measurements of a run, as a function of its steps alone: a resumed run writes the same bytes."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.recipe import TrainParams

LOSSES = ("diffusion", "cscl", "macl", "location", "total")
ACCURACIES = ("cscl_accuracy", "macl_accuracy")
# Logged per step besides the losses.
OF_THE_UPDATE = ("learning_rate", "gradient_norm")
# Fraction of the run over which the final losses are averaged: single steps vary with their timesteps.
TAIL = 0.1

Row = list[Any]
"""A step count (1 = after the first step), then one number per column, None if there was nothing to measure."""


@dataclass(frozen=True)
class Measures:
    """Quantities measured from a step's losses."""

    timesteps: int
    """Of the diffusion process."""
    buckets: int
    """Number of equal ranges of timesteps."""

    @property
    def names(self) -> tuple[str, ...]:
        """Losses, accuracies, and L_diff per bucket, named by its first and last timestep."""
        edges = [-(-self.timesteps * n // self.buckets) for n in range(self.buckets + 1)]
        buckets = [f"diffusion_{first}_{end - 1}" for first, end in itertools.pairwise(edges)]
        return (*LOSSES, *ACCURACIES, *buckets)

    def of(self, losses: Mapping[str, Tensor], timesteps: Tensor) -> Tensor:
        """[2, names] float64 of samples at `timesteps` [B]: numerators and denominators, both means over the samples.

        Averaging either over ranks, micro-batches or steps of equal size gives such a mean again, so one all-reduce
        suffices and the quotient is exact: a bucket's is the sum of its samples' L_diff over their number. A quantity
        that was not measured has denominator 0.
        """
        one = losses["total"].new_ones((), dtype=torch.float64)
        plain = [losses[name].detach().to(one) for name in LOSSES]
        found = [(losses[name].to(one), one) if name in losses else (one - one, one - one) for name in ACCURACIES]
        bucket = timesteps * self.buckets // self.timesteps
        inside = (bucket[:, None] == torch.arange(self.buckets, device=bucket.device)).to(one)
        numerators = [*plain, *(value for value, _ in found)]
        denominators = [*[one] * len(plain), *(weight for _, weight in found)]
        return torch.stack(
            [
                torch.cat([torch.stack(numerators), losses["sample_diffusion"].to(one) @ inside / len(bucket)]),
                torch.cat([torch.stack(denominators), inside.mean(dim=0)]),
            ]
        )


class Windows:
    """Column means over windows of `every` additions."""

    def __init__(self, columns: Sequence[str], every: int) -> None:
        self.columns, self.every = tuple(columns), every
        self.rows: list[Row] = []
        self.window: list[list[list[float]]] = []

    def add(self, step: int, values: list[list[float]]) -> None:
        """Add [2, columns] numerators and denominators of a 0-based step."""
        self.window.append(values)
        if len(self.window) == self.every:
            self.close(step)

    def close(self, step: int) -> None:
        """Close the window at this step."""
        if self.window:
            self.rows.append([step + 1, *self.means()])
            self.window = []

    def means(self) -> list[float | None]:
        """Column means of the open window."""
        numerators, denominators = np.array(self.window).sum(axis=0).tolist()
        return [a / b if b else None for a, b in zip(numerators, denominators, strict=True)]

    def latest(self) -> dict[str, float | None]:
        """Means of the open window, else of the last one, by column."""
        means = self.means() if self.window else self.rows[-1][1:] if self.rows else []
        return dict(zip(self.columns, means, strict=False))

    def ended(self, step: int) -> dict[str, Any] | None:
        """The row of the window that this 0-based step closed, by column, or None."""
        return self.named(-1) if self.rows and self.rows[-1][0] == step + 1 else None

    def named(self, row: int) -> dict[str, Any]:
        """A row by column, rounded as in the file."""
        step, *values = self.rows[row]
        return {"step": step, **dict(zip(self.columns, map(rounded, values), strict=True))}

    def mean(self, name: str, rows: Sequence[Row]) -> float | None:
        """Mean of a column over those of `rows` that measured it."""
        place = 1 + self.columns.index(name)
        found = [row[place] for row in rows if row[place] is not None]
        return sum(found) / len(found) if found else None

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"rows": self.rows, "window": self.window}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint's state."""
        self.rows, self.window = state["rows"], state["window"]

    def write(self, file: Path) -> None:
        """Write the rows as CSV; unmeasured values are empty cells."""
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(("step", *self.columns))
            writer.writerows([row[0], *map(rounded, row[1:])] for row in self.rows)


class Record:
    """Measurements of a run so far: one row per `log_every` steps, and one per validation."""

    def __init__(self, params: TrainParams, measures: Measures) -> None:
        self.params = params
        self.training = Windows((*measures.names, *OF_THE_UPDATE), params.log_every)
        self.validation = Windows(measures.names, params.validation.batches)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return self.training.state() | {"validation": self.validation.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint's state."""
        self.training.restore(state)
        self.validation.restore(state["validation"])

    def metrics(self) -> dict[str, Any]:
        """Mean losses and accuracies over the last tenth of the run, and the last validation."""
        rows = self.training.rows
        tail = rows[-max(1, round(TAIL * len(rows))) :]
        means = {name: rounded(self.training.mean(name, tail)) for name in (*LOSSES, *ACCURACIES)}
        last = self.validation.named(-1) if self.validation.rows else {}
        validation = {name: value for name, value in last.items() if name != "step" and value is not None}
        found = {name: value for name, value in means.items() if value is not None}
        return found | ({"validation": validation} if validation else {})

    def write(self, folder: Path) -> None:
        """Write losses.csv and validation.csv."""
        self.training.write(folder / "losses.csv")
        self.validation.write(folder / "validation.csv")

    def warnings(self, step: int) -> list[str]:
        """One sentence per plateau. They are checked only at the first window that ends at or after the fraction
        `warnings.after` of the run, so each is given once however often a run is resumed."""
        deadline = self.params.warnings.after * self.params.steps
        rows = self.training.rows
        if not rows or rows[-1][0] != step + 1 or rows[-1][0] < deadline or (len(rows) > 1 and rows[-2][0] >= deadline):
            return []
        return list(standstills(self.training, self.params))

    def table(self) -> list[str]:
        """Lines of a table: each loss and accuracy in the first and last window, and the last validation."""
        lines = [f"{'':15}{'first':>11}{'last':>11}{'validation':>12}"]
        for name in (*LOSSES, *ACCURACIES):
            rows = (self.training.rows[:1], self.training.rows[-1:])
            first, last = (self.training.mean(name, row) for row in rows)
            held_out = self.validation.mean(name, self.validation.rows[-1:])
            if first is not None or last is not None:
                lines.append(f"{name:15}{shown(first):>11}{shown(last):>11}{shown(held_out):>12}")
        return lines


def standstills(log: Windows, params: TrainParams) -> Iterator[str]:
    """Yield a sentence for each quantity that is on a plateau according to the rows of `log`.

    With `first` and `now` the means of the first and last `windows` rows, a quantity has moved if it has covered at
    least the fraction `location` or `accuracy` of the way from `first` to its best value (-1 for the location loss, 1
    for an accuracy), or if at most that fraction remains of the way there from chance (0 for the location loss, 1/C for
    an accuracy): what is learned within the first windows need not move any further. Losses that are switched off are
    skipped, and so is everything while there are fewer than 2 `windows` rows.
    """
    rule, rows, objective = params.warnings, log.rows, params.objective
    if len(rows) < 2 * rule.windows:
        return
    early, recent = rows[: rule.windows], rows[-rule.windows :]
    chance = 1 / params.batch
    advice = "raise train.learning_rate or train.objective.contrastive_weight"
    watched = dict.fromkeys(ACCURACIES, (chance, 1.0, rule.accuracy, advice))
    if objective.location_weight > 0:
        watched["location"] = (0.0, -1.0, rule.location, "raise train.objective.location_weight")
    for name, (baseline, best, share, remedy) in watched.items():
        first, now = log.mean(name, early), log.mean(name, recent)
        if first is None or now is None:
            continue
        left = abs(best - now)
        if left <= (1 - share) * abs(best - first) or left <= share * abs(best - baseline):
            continue
        yield (
            f"{name.replace('_', ' ')} has not moved: {first:.4g} up to step {early[-1][0]}, {now:.4g} up to step"
            f" {recent[-1][0]} (best {best:g}, chance {baseline:.3g}); {remedy}, or train longer"
        )


def rounded(value: float | None) -> float | None:
    """Six significant digits."""
    return None if value is None else float(f"{value:.6g}")


def shown(value: float | None) -> str:
    """Four significant digits, or "" if there is no value."""
    return "" if value is None else f"{value:.4g}"
