"""Stage declarations, shared by the command line, DVC, the report and the digest of a stage's code."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.closure import ROOT, closure

PACKAGES = (
    "pipelines.toybox",
    "pipelines.selfaugment",
    "pipelines.curate",
    "pipelines.mask",
    "pipelines.similarity",
    "pipelines.pairs",
    "pipelines.encode",
    "train",
    "train.rivals",
    "eval.generate",
    "eval.score",
    "eval.probes.views",
    "eval.probes.location",
    "eval.report",
)
"""The stages' packages, in the order in which `dvc repro` runs them. Each has a `STAGE`."""
SECONDS = {
    "toybox": 9,
    "selfaugment": 1,
    "curate": 9,
    "mask": 28,
    "similarity": 19,
    "pairs": 6,
    "encode": 38,
    "train": 222,
    "rivals": 1,
    "generate": 56,
    "score": 17,
    "views": 8,
    "location": 11,
    "report": 4,
}
"""What a stage takes with the shipped params.yaml on two quiet cores; the pace is that of the stages before."""


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    Attributes:
        name: name of its command, of its folder in `data`, and in `dvc.yaml`.
        module: module to run; it has `main(params, **options)`.
        summary: one-line description.
        sections: its sections of params.yaml, without `run`, which never changes results; `section.key` where it reads
            that key alone.
        reads: inputs in the data folder, `<stage>/<table or file>`, or a whole `<stage>`.
        writes: outputs in its own folder, besides metrics and plots.
        weights: backbones it loads, as fields of `model.backbones.variant.Variant`.
        metrics: whether it writes metrics.json, and summary.json for `dvc metrics show`.
        plots: CSV files for `dvc plots`.
        rows: module whose import closure its rows depend on; default: `module`.
        also: modules it runs in other processes.
        options: options of its command besides the shared ones, {flag: keywords of `add_argument`}.
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

        A module in a subpackage counts as that package (`pipelines/mask`), one directly in a top-level package as the
        whole package.
        """
        files = [file.relative_to(ROOT) for file in closure(self.module, *self.also) if file.name != "__init__.py"]
        found = {"/".join(file.parts[:-1][:2]) for file in files}
        return sorted(place for place in found if place.split("/")[0] == place or place.split("/")[0] not in found)

    def outputs(self) -> list[str]:
        """Return the stage's outputs other than its summary and plots."""
        names = (*self.writes, *(("metrics.json",) if self.metrics else ())) or ("",)
        return [f"data/{self.name}/{name}".rstrip("/") for name in names]


def stage(package: str) -> Stage:
    """Return the stage declared by a package."""
    found: Stage = importlib.import_module(package).STAGE
    return found


def stages() -> dict[str, Stage]:
    """Return all stages by name, in execution order."""
    return {found.name: found for found in map(stage, PACKAGES)}
