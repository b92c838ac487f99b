"""The runs of the ablation, read from `ablation.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml

from runtime.errors import UserError
from runtime.params import Section, parse

FILE = Path(__file__).with_name("ablation.yaml")
Kind = Literal["ablation", "baseline", "factor"]


class Run(Section):
    """One training configuration."""

    title: str
    kind: Kind = "ablation"
    params: dict[str, Any]  # overrides params.yaml
    paper: tuple[float, float, float] | None = None  # E-CI, E-DI, CT of Tables 3 and 4; for a baseline, of Table 1
    against: str | None = None  # the run it is compared with


class Matrix(Section):
    """The whole of ablation.yaml."""

    common: dict[str, Any]  # overrides params.yaml for all runs
    world: dict[str, Any]  # the evaluation's sources
    runs: dict[str, Run]
    seeds: dict[Kind, list[int]]


def read_matrix(file: Path = FILE) -> Matrix:
    """Read `ablation.yaml`.

    Raises:
        UserError: a key is unknown or missing, or a run is compared with an unknown one.
    """
    matrix = parse(file.name, yaml.safe_load(file.read_text(encoding="utf-8")), Matrix)
    for name, run in matrix.runs.items():
        if run.against is not None and run.against not in matrix.runs:
            raise UserError(f"{file.name}: {name} is compared with '{run.against}', which is not a run; correct it")
    return matrix
