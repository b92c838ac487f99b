"""Train, sample and score the missing runs of the ablation, and write the document: `python -m experiments.ablation`.

Each run of `ablation.yaml` overrides a few values of params.yaml. The stages' own commands do the work; the results go
to `experiments/results/RUN-SEED.json`, which is kept as long as recipe, data, weights and evaluation settings stay the
same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.document import write_document
from experiments.matrix import FILE, Matrix, Run, read_matrix
from model.backbones.variant import Spec, load_variant
from runtime.cli import Parser, guarded, read_params, shared_options
from runtime.digest import digest, digest_files
from runtime.errors import UserError
from runtime.files import write_json, write_text
from runtime.lock import exclusive
from runtime.params import Params
from train.recipe import input_digest
from train.toybox.models.judge import FOLDER as JUDGE

HERE = Path(__file__).parent
RESULTS, DOCUMENT = HERE / "results", HERE.parent / "docs" / "ablation.md"
TABLES = "tables.json"
"""Beside the results: the tables that they are compared with where the tables themselves are not there."""
WORK = Path(".work/ablation")
TRAINED_ON = ("curate", "similarity", "pairs", "encode")
"""Stages of the default pipeline whose tables training reads."""
MEASURED_ON = ("curate", "mask")
"""Stages of the matrix's own world whose tables the evaluation reads."""
MEASURED_BY = ("backbones", "toybox", "sources", "curate", "mask", "views", "score")
"""Sections of params.yaml that determine the evaluation."""
STAGES = ("eval.generate", "eval.score", "eval.probes.views", "experiments.truth")
"""Modules run on a trained adapter, in order."""

Result = dict[str, Any]


@dataclass(frozen=True)
class SeededRun:
    """One run with one seed."""

    name: str
    run: Run
    seed: int
    overlay: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{self.name}-{self.seed}"

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.label}.json"


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """Mappings merged recursively, later ones taking precedence; other values are replaced."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def jobs_of(matrix: Matrix, wanted: Sequence[str], seeds: int | None) -> list[SeededRun]:
    """All runs of the first seed, then all of the second, so that stopping early leaves complete tables."""
    found = []
    for name, run in matrix.runs.items():
        for place, seed in enumerate(matrix.seeds[run.kind][:seeds]):
            overlay = merged(matrix.common, run.params, {"train": {"seed": seed}})
            found.append((place, SeededRun(name, run, seed, overlay)))
    chosen = [job for _, job in sorted(found, key=lambda pair: pair[0]) if not wanted or job.name in wanted]
    return chosen


def recipe_of(job: SeededRun, params: Params, world: dict[str, Any]) -> str:
    """16 hex digits of the params that a job is trained and sampled with."""
    tree = merged(params.tree(), job.overlay)
    return digest([tree[name] for name in ("backbones", "model", "train", "generate")], world)


@dataclass(frozen=True)
class Circumstances:
    """Conditions common to all runs, each as 16 hex digits; results under other conditions are not shown together."""

    tables: str
    """The default pipeline's tables, which training reads."""
    weights: str
    """Weights of all frozen models, including the judge."""
    measures: str
    """Params and weights of the evaluation."""

    @property
    def name(self) -> str:
        """The `data` that a result records."""
        return digest(self.tables, self.measures)


def circumstances(params: Params, tables: str, world: dict[str, Any]) -> Circumstances:
    """The circumstances under the current params and weights."""
    tree = merged(params.tree(), world)
    variant = load_variant(params.variant)
    specs = [spec for _, spec in variant if isinstance(spec, Spec)]
    named = [[spec.model_dump(), digest_files(spec.local) if spec.local.exists() else None] for spec in specs]
    weights = digest(named, digest_files(JUDGE))
    return Circumstances(tables, weights, digest([tree[name] for name in MEASURED_BY], weights))


def result_of(job: SeededRun, params: Params, world: dict[str, Any]) -> Result | None:
    """The stored result, if its recipe is the job's."""
    if not job.result.is_file():
        return None
    result = read_json(job.result)
    return result if result["recipe"] == recipe_of(job, params, world) else None


def is_done(job: SeededRun, params: Params, world: dict[str, Any], data: str) -> bool:
    """Whether there is a result of the current params and this data (`Circumstances.name`)."""
    result = result_of(job, params, world)
    return result is not None and result["data"] == data


def current_results(matrix: Matrix, params: Params, data: str) -> list[Result]:
    """The results of the current params and this data; if there are none, those of the previous data.

    Raises:
        UserError: there are none of this data, and the others are of several data.
    """
    jobs = jobs_of(matrix, [], None)
    results = [result for result in (result_of(job, params, matrix.world) for job in jobs) if result is not None]
    mine = [result for result in results if result["data"] == data]
    first = {result["data"]: f"{result['run']}-{result['seed']}" for result in reversed(results)}
    if len(first) > 1 and not mine:
        raise UserError(
            f"{RESULTS}: {' and '.join(first.values())} were trained on different data; run make ablation again"
        )
    return mine or results


def recorded_tables() -> str:
    """The digest of the default pipeline's tables when runs were last made or looked for."""
    return str(read_json(RESULTS / TABLES)["digest"])


def command(module: str, folder: Path, data: Path, log: Path) -> None:
    """Run a stage with the overlay in `folder` on the tables in `data`; its output goes to `log`.

    Raises:
        UserError: it failed; the message has the last line of its output.
    """
    words = [sys.executable, "-m", module, "--params", str(folder / "overlay.yaml"), "--data", str(data)]
    with log.open("a", encoding="utf-8") as stream:
        code = subprocess.run(words, stdout=stream, stderr=stream, check=False).returncode
    if code:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{module} of {folder.name} ended with code {code} ({last}); see {log}")


def link(folder: Path, places: dict[str, Path]) -> Path:
    """Create `folder` with a symlink to each of `places`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, place in places.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(place.resolve())
    return folder


def write_overlay(folder: Path, params: Params, *trees: dict[str, Any]) -> None:
    """Write the params of the stages of a folder: `params`, overridden by `trees` and a work folder."""
    overlay = merged(params.tree(), *trees, {"run": {"work": str(folder / "work")}})
    write_text(folder / "overlay.yaml", yaml.safe_dump(overlay, sort_keys=False))


def prepare_world(matrix: Matrix, params: Params, measures: str) -> Path:
    """Render, curate and mask the evaluation subjects, once; return the folder of their tables."""
    folder = WORK / f"world-{measures}"
    data = folder / "data"
    if not (data / "mask" / "summary.json").is_file():
        write_overlay(folder, params, matrix.world)
        print("ablation: preparing evaluation subjects: render, curate, mask", flush=True)
        for module in ("pipelines.toybox", "pipelines.curate", "pipelines.mask"):
            command(module, folder, data, folder / "log.txt")
    return data


def execute(job: SeededRun, matrix: Matrix, params: Params, of: Circumstances, bench: Path) -> None:
    """Train and measure one job, and write its result."""
    recipe = recipe_of(job, params, matrix.world)
    folder = WORK / f"{job.label}-{digest(recipe, of.tables, of.weights)}"
    begun = time.monotonic()
    training = link(folder / "training", {stage: params.data / stage for stage in TRAINED_ON})
    write_overlay(folder, params, job.overlay, matrix.world)
    adapter = training / "train"
    if not (adapter / "summary.json").is_file():  # written last
        command("train", folder, training, folder / "log.txt")
    trained = time.monotonic()
    measured = link(folder / "data", {stage: bench / stage for stage in MEASURED_ON} | {"train": adapter})
    for module in STAGES:
        command(module, folder, measured, folder / "log.txt")
    parts = {name: read_json(measured / name / "metrics.json") for name in ("train", "score", "views", "truth")}
    minutes = {"train": round((trained - begun) / 60, 1), "measure": round((time.monotonic() - trained) / 60, 1)}
    header = {"run": job.name, "seed": job.seed, "recipe": recipe, "data": of.name, "minutes": minutes}
    write_json(job.result, header | parts)


def read_json(file: Path) -> dict[str, Any]:
    """The content of a metrics file or a result."""
    return json.loads(file.read_text(encoding="utf-8"))


def main(words: Sequence[str]) -> None:
    parser = Parser(prog="python -m experiments.ablation", description=__doc__)
    parser.add_argument("runs", nargs="*", help="names of runs in ablation.yaml (default: all)")
    parser.add_argument("--seeds", type=int, help="number of seeds of each run, the first ones (default: all)")
    parser.add_argument(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs in parallel (default: %(default)s)"
    )
    parser.add_argument("--document", action="store_true", help="only write the document from existing results")
    shared_options(parser)
    options = parser.parse_args(words)
    params, matrix = read_params(options), read_matrix()
    unknown = [name for name in options.runs if name not in matrix.runs]
    if unknown:
        raise UserError(f"there is no run '{unknown[0]}' in {FILE.name}; choose from {', '.join(matrix.runs)}")
    if options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}; give at least 1")
    if not options.document:
        with exclusive("ablation", WORK):
            run_missing(matrix, params, options.runs, options.seeds, options.jobs)
    tables = recorded_tables() if options.document else input_digest(params.data)
    data = circumstances(params, tables, matrix.world).name
    write_document(matrix, current_results(matrix, params, data), data, DOCUMENT)
    print(f"ablation: {DOCUMENT.relative_to(HERE.parent)}")


def run_missing(matrix: Matrix, params: Params, names: Sequence[str], seeds: int | None, parallel: int) -> None:
    """Run the jobs that have no result for their recipe yet, in parallel; the document is rewritten after each.

    Raises:
        TableError: the default pipeline's tables are missing.
        UserError: some jobs failed; raised after all others have run.
    """
    of = circumstances(params, input_digest(params.data), matrix.world)
    write_json(RESULTS / TABLES, {"digest": of.tables})
    jobs = jobs_of(matrix, names, seeds)
    missing = [job for job in jobs if not is_done(job, params, matrix.world, of.name)]
    print(f"ablation: {len(jobs) - len(missing)} of {len(jobs)} runs are done", flush=True)
    if not missing:
        return
    bench, failed = prepare_world(matrix, params, of.measures), []

    def work(job: SeededRun) -> None:
        try:
            print(f"ablation: {job.label} started", flush=True)
            execute(job, matrix, params, of, bench)
            write_document(matrix, current_results(matrix, params, of.name), of.name, DOCUMENT)
            print(f"ablation: {job.label} done", flush=True)
        except UserError as error:
            failed.append(job.label)
            print(f"ablation: {error}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(work, missing))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(missing)} runs failed: {', '.join(sorted(failed))}; the others are done, see the "
            f"errors above"
        )


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
