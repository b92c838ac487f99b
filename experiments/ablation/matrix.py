"""The runs of an experiment, read from a file such as `ablation.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from runtime.errors import UserError
from runtime.params import Section, parse

FILE = Path(__file__).with_name("ablation.yaml")
SEARCH = Path(__file__).with_name("search.yaml")
Kind = Literal["ablation", "baseline", "reading", "factor", "rival", "trial"]


Points = dict[str, dict[str, Any]]
"""Operating points between similarity and controllability: name -> what it overrides in section generate."""


class Run(Section):
    """One training configuration."""

    title: str
    kind: Kind = "ablation"
    params: dict[str, Any]  # overrides params.yaml
    paper: tuple[float, float, float] | None = None  # E-CI, E-DI, CT of Tables 3 and 4; for a baseline, of Table 1
    against: str | None = None  # the run it is compared with
    points: str | None = None  # name of its operating points; None: those of its plan
    every_seed: bool = False  # measured everywhere with each seed, as other runs are compared with it there


class Schedule(Section):
    """What is trained and measured of each run of a kind."""

    seeds: list[int]
    samples: list[int] = Field(min_length=1)  # of the measured adapters, ascending: one run is trained on from each
    points: str | None = None  # name of the operating points measured at the last, besides the run's own setting
    curves: int | None = Field(default=None, ge=1)
    """How many seeds are measured at all samples and points, the others where runs are compared; None: all."""


class Matrix(Section):
    """A whole file."""

    common: dict[str, Any]  # overrides params.yaml for all runs
    world: dict[str, Any]  # the evaluation's sources
    points: dict[str, Points] = Field(default_factory=dict)
    plans: dict[Kind, Schedule]
    runs: dict[str, Run]

    def plan(self, name: str) -> Schedule:
        """The plan of a run."""
        return self.plans[self.runs[name].kind]

    def curve(self, name: str) -> Points:
        """The operating points of a run besides its own setting."""
        return self.points.get(self.runs[name].points or self.plan(name).points or "", {})

    def measured_at(self, name: str, seed: int) -> tuple[list[int], Points]:
        """The numbers of samples after which a run is measured with a seed, and its operating points at the last."""
        run, plan = self.runs[name], self.plan(name)
        if run.every_seed or seed in plan.seeds[: plan.curves]:
            return plan.samples, self.curve(name)
        compared = {self.plan(other).samples[-1] for other, of in self.runs.items() if of.against == name}
        return [count for count in plan.samples if count in compared or count == plan.samples[-1]], {}


def read_matrix(file: Path = FILE) -> Matrix:
    """Read a matrix.

    Raises:
        UserError: a key is unknown or missing, a run is compared with an unknown one, or a kind has no plan.
    """
    matrix = parse(file.name, yaml.safe_load(file.read_text(encoding="utf-8")), Matrix)
    for name, run in matrix.runs.items():
        if run.against is not None and run.against not in matrix.runs:
            raise UserError(f"{file.name}: {name} is compared with '{run.against}', which is not a run; correct it")
        if run.kind not in matrix.plans:
            raise UserError(f"{file.name}: {name} is of kind '{run.kind}', which has no entry in plans; add one")
        points = run.points or matrix.plan(name).points
        if points is not None and points not in matrix.points:
            raise UserError(f"{file.name}: {name} has the points '{points}', which are not there; add or correct them")
    return matrix
