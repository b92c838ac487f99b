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
    points: str | None = None  # name of its operating points, besides its own setting
    every_seed: bool = False  # its points are measured with each seed, as runs are compared there; else with the first
    further: tuple[int, ...] = ()  # ascending numbers of samples that the first seed is trained on to and measured at


class Schedule(Section):
    """With which seeds each run of a kind is trained, and after how many samples it is measured and compared."""

    seeds: list[int] = Field(min_length=1)
    samples: int


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
        return self.points.get(self.runs[name].points or "", {})

    def counts(self, name: str) -> list[int]:
        """The numbers of samples of a run's learning curve, ascending; it is compared at the first."""
        return [self.plan(name).samples, *self.runs[name].further]

    def measured_at(self, name: str, seed: int) -> tuple[list[int], Points]:
        """The numbers of samples at which a run is measured with a seed, and its operating points at the first."""
        run, plan = self.runs[name], self.plan(name)
        first = seed == plan.seeds[0]
        return self.counts(name) if first else [plan.samples], self.curve(name) if first or run.every_seed else {}


def read_matrix(file: Path = FILE) -> Matrix:
    """Read a matrix.

    Raises:
        UserError: a key is unknown or missing, a kind has no plan, points are not there, or a run is compared with an
            unknown one or with one that is measured elsewhere.
    """
    matrix = parse(file.name, yaml.safe_load(file.read_text(encoding="utf-8")), Matrix)
    for name, run in matrix.runs.items():
        if run.kind not in matrix.plans:
            raise UserError(f"{file.name}: {name} is of kind '{run.kind}', which has no entry in plans; add one")
        if run.points is not None and run.points not in matrix.points:
            raise UserError(
                f"{file.name}: {name} has the points '{run.points}', which are not there; add or correct them"
            )
    for name, other in ((name, run.against) for name, run in matrix.runs.items() if run.against is not None):
        if other not in matrix.runs:
            raise UserError(f"{file.name}: {name} is compared with '{other}', which is not a run; correct it")
        if matrix.plan(name).samples != matrix.plan(other).samples:
            raise UserError(
                f"{file.name}: {name} is compared with {other}, which is measured after another number of samples; "
                f"correct plans"
            )
    return matrix
