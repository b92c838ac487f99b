"""What is to be measured of a matrix's runs, and the stored results that count."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.ablation.matrix import Matrix, Run, read_matrix
from model.backbones.variant import Spec, load_variant
from pipelines import tables
from runtime.digest import digest, digest_files
from runtime.params import Params, flat
from train.toybox.lessons.registry import TOYS
from train.toybox.models import judge

RESULTS = Path(__file__).parents[1] / "results"
WORK = Path(".work")
Result = dict[str, Any]
"""`run`, `seed`, `settings`, `data`, and `measured`: a mapping for each measurement."""

SETTINGS = (
    "backbones",
    "model",
    "train",
    "generate",
    "toybox",
    "sources",
    "curate",
    "mask",
    "similarity",
    "pairs",
    "encode",
    "views",
    "score",
)
"""Sections of params.yaml that determine a measurement."""
OWN = "own"
"""Name of a run's own setting among its operating points."""
WITHOUT_EFFECT = {"train.steps", "train.checkpoint_every", "train.ranks", "train.prefetch", "generate.processes"}
"""Settings of those sections that a measurement records by itself, or that change nothing."""


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """Mappings merged recursively, later ones taking precedence; other values are replaced."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


@dataclass(frozen=True)
class Experiment:
    """A matrix under the current params, photos and weights."""

    matrix: Matrix
    params: Params
    name: str
    """Of the matrix: that of its file, and of its folder of results."""
    photos: str
    """`photos_digest` of the photos that are trained on."""

    @cached_property
    def weights(self) -> str:
        """16 hex digits of the weights of all frozen models, including the judge."""
        variant = load_variant(self.params.variant)
        specs = [spec for _, spec in variant if isinstance(spec, Spec)]
        named = [[spec.model_dump(), digest_files(spec.local) if spec.local.exists() else None] for spec in specs]
        return digest(named, digest_files(judge.folder(TOYS)))

    @property
    def data(self) -> dict[str, str]:
        """What a result was trained and measured with, besides its settings.

        Of tables only what the renderer drew: features and similarities, which follow from it, from the weights and
        from the settings, differ in their last bits between processors, and a matrix may be made on several.
        """
        return {"photos": self.photos, "weights": self.weights}

    @property
    def work(self) -> Path:
        return WORK / self.name

    def jobs(self, wanted: Sequence[str] = (), seeds: int | None = None) -> list[SeededRun]:
        """All runs of the first seed, then all of the second, so that stopping early leaves complete tables."""
        found = [
            (place, SeededRun(self, name, seed))
            for name in self.matrix.runs
            for place, seed in enumerate(self.matrix.plan(name).seeds[:seeds])
        ]
        return [job for _, job in sorted(found, key=lambda pair: pair[0]) if not wanted or job.name in wanted]

    def results(self) -> list[Result]:
        """The results that count."""
        found = (job.recorded() for job in self.jobs())
        return [result for result in found if result is not None and result["measured"]]


@dataclass(frozen=True)
class Wanted:
    """A measurement: of the adapter after so many samples, at a point."""

    samples: int
    point: str
    """OWN, or the name of another operating point of its curve."""
    generate: dict[str, Any]
    """What the point overrides in section generate."""

    further: bool = False
    """Whether it is beyond the number of samples at which runs are compared."""

    @property
    def own(self) -> bool:
        """Whether it is at the run's own setting."""
        return self.point == OWN


@dataclass(frozen=True)
class SeededRun:
    """One run with one seed."""

    experiment: Experiment
    name: str
    seed: int

    @property
    def run(self) -> Run:
        return self.experiment.matrix.runs[self.name]

    @property
    def label(self) -> str:
        return f"{self.name}-{self.seed}"

    @property
    def file(self) -> Path:
        return result_file(self.experiment.name, self.label)

    @cached_property
    def tree(self) -> dict[str, Any]:
        """The params of the run."""
        matrix = self.experiment.matrix
        trees = (self.experiment.params.tree(), matrix.common, self.run.params, {"train": {"seed": self.seed}})
        return merged(*trees, matrix.world)

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted key -> value of everything that determines its measurements."""
        found = flat({name: self.tree[name] for name in SETTINGS})
        return {key: value for key, value in found if key not in WITHOUT_EFFECT}

    def wanted(self) -> list[Wanted]:
        """Its measurements in order: its own setting, its operating points, and the rest of its learning curve."""
        (samples, *further), points = self.experiment.matrix.measured_at(self.name, self.seed)
        found = [Wanted(samples, OWN, {}), *(Wanted(samples, point, of) for point, of in points.items())]
        return found + [Wanted(count, OWN, {}, further=True) for count in further]

    def recorded(self) -> Result | None:
        """The stored result, if its settings, photos and weights are the current ones.

        Settings that are newer than the result do not count: their defaults leave things as they were.
        """
        if not self.file.is_file():
            return None
        result, now = read_json(self.file), self.settings
        same = all(key in now and now[key] == value for key, value in result["settings"].items())
        return result if same and result["data"] == self.experiment.data else None

    def missing(self) -> list[Wanted]:
        """The measurements that are not recorded."""
        measured = (self.recorded() or {}).get("measured", [])
        done = {(one["samples"], one["point"]) for one in measured}
        return [wanted for wanted in self.wanted() if (wanted.samples, wanted.point) not in done]


def experiment_of(file: Path, params: Params, photos: str | None = None) -> Experiment:
    """The matrix in `file`. photos: the digest of the training photos (default: the recorded one)."""
    return Experiment(read_matrix(file), params, file.stem, photos or recorded_photos(file.stem))


def result_file(matrix: str, label: str) -> Path:
    """Where the result of a run with a seed lies."""
    return RESULTS / matrix / f"{label}.json"


def photos_digest(data: Path) -> str:
    """16 hex digits of the photos that curate kept, of the masks that came with them, and of how they were masked.

    Raises TableError if there are none.
    """
    read = (("curate", "frames", ("frame_id", "sha256", "mask_sha256")), ("mask", "masks", ("frame_id", "method")))
    found = [
        sorted([row[name] for name in columns] for row in tables.rows(data / stage, table, columns))
        for stage, table, columns in read
    ]
    return digest(found)


def recorded_photos(matrix: str) -> str:
    """The digest of the training photos when runs of a matrix were last looked for; empty if never."""
    file = result_file(matrix, "photos")
    return str(read_json(file)["digest"]) if file.is_file() else ""


def read_json(file: Path) -> dict[str, Any]:
    """The content of a metrics file or a result."""
    return json.loads(file.read_text(encoding="utf-8"))
