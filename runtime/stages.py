"""What a stage is: declared once, for the command line, DVC, the report and the identity of its code."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.closure import ROOT, closure

PACKAGES = (
    "pipelines.toybox",
    "pipelines.curate",
    "pipelines.mask",
    "pipelines.similarity",
    "pipelines.pairs",
    "pipelines.encode",
    "train",
    "eval.generate",
    "eval.score",
    "eval.probes.views",
    "eval.probes.location",
    "eval.report",
)
"""The packages of the stages, in the order in which `dvc repro` runs them. Each has a `STAGE`."""


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    Attributes:
        name: of the command, of its folder below `data`, and in `dvc.yaml`.
        module: what is run; it has `main(params, **options)`.
        summary: one line for people.
        sections: of params.yaml, without `run`, which never changes what comes out.
        reads: what it reads below the data folder, `<stage>/<table or file>`, or a whole `<stage>`.
        writes: what it writes below its own folder, beside its metrics and plots.
        weights: the backbones it loads, fields of `model.backbones.variant.Variant`.
        metrics: whether it writes metrics.json, and summary.json for `dvc metrics show`.
        plots: CSV files for `dvc plots`.
        rows: the module whose import closure names what its rows depend on; `module` where it is not given.
        also: modules that it runs in other processes.
        options: of its command beside the shared ones, {flag: keywords of `add_argument`}.
    """

    name: str
    module: str
    summary: str
    sections: tuple[str, ...]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    metrics: bool = True
    plots: tuple[str, ...] = ()
    rows: str | None = None
    also: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def code(self) -> str:
        """Return 16 hex digits that change with any line of code that the stage's rows depend on."""
        from runtime.closure import code_digest

        return code_digest(self.rows or self.module)

    def folders(self) -> list[str]:
        """Return the folders of the code that the stage runs, relative to the repository, outermost first.

        A module inside a package of a room counts as that package (`pipelines/mask`), one directly in a room as the
        whole room.
        """
        files = [file.relative_to(ROOT) for file in closure(self.module, *self.also) if file.name != "__init__.py"]
        found = {"/".join(file.parts[:-1][:2]) for file in files}
        return sorted(place for place in found if place.split("/")[0] == place or place.split("/")[0] not in found)

    def outputs(self) -> list[str]:
        """Return what the stage writes beside its summary and plots."""
        names = (*self.writes, *(("metrics.json",) if self.metrics else ())) or ("",)
        return [f"data/{self.name}/{name}".rstrip("/") for name in names]


def stage(package: str) -> Stage:
    """Return the stage that a package declares."""
    found: Stage = importlib.import_module(package).STAGE
    return found


def stages() -> dict[str, Stage]:
    """Return all stages by name, in the order in which they run."""
    return {found.name: found for found in map(stage, PACKAGES)}
