"""Train, sample and score what is missing of the ablation, and write the document: `python -m experiments.ablation`.

Each run of a matrix (`ablation.yaml`, `search.yaml`) overrides a few values of params.yaml. The stages' own commands do
the work. A run is trained to its first number of samples, measured, and trained on to the next; each measurement goes
to `experiments/results/<matrix>/RUN-SEED.json` at once, and counts as long as data, weights and settings stay the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from eval.score import metrics
from experiments.ablation.document import write_document
from experiments.ablation.experiment import (
    WORK,
    Experiment,
    Result,
    SeededRun,
    Wanted,
    experiment_of,
    merged,
    photos_digest,
    read_json,
    result_file,
)
from experiments.ablation.matrix import FILE, read_matrix
from experiments.truth import PLAIN
from pipelines import tables
from runtime.cli import Parser, read_params, shared_options
from runtime.digest import digest
from runtime.errors import UserError
from runtime.files import write_json, write_text
from runtime.lock import exclusive

TRAINED_ON = ("curate", "mask", "similarity", "pairs", "encode")
"""Stages whose tables training reads."""
MEASURED_ON = ("curate", "mask")
"""Stages of the matrix's own world whose tables the evaluation reads."""
SCORED = "scored"
"""Beside them, finished tasks of scoring."""


def command(stages: Sequence[str], overlay: Path, data: Path, log: Path, *words: str) -> None:
    """Run stages, one after another, with the params in `overlay` on the tables in `data`; their output goes to `log`.

    Raises:
        UserError: one failed; the message has the last line of its output.
    """
    options = ("--params", str(overlay), "--data", str(data), *words)
    with log.open("a", encoding="utf-8") as stream:
        run = (sys.executable, "-m", "experiments.ablation.stages", *stages, "--", *options)
        code = subprocess.run(run, stdout=stream, stderr=stream, check=False).returncode
    if code:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{', '.join(stages)} of {overlay.parent} ended with code {code} ({last}); see {log}")


def link(folder: Path, places: dict[str, Path]) -> Path:
    """Create `folder` with a symlink to each of `places`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, place in places.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(place.resolve())
    return folder


def write_overlay(folder: Path, *trees: dict[str, Any]) -> Path:
    """Write the params of the stages of a folder, merged from `trees`, with a work folder; return the file."""
    file, tree = folder / "overlay.yaml", merged(*trees, {"run": {"work": str(folder / "work")}})
    write_text(file, yaml.safe_dump(tree, sort_keys=False))
    return file


def prepare_world(experiment: Experiment) -> Path:
    """Render, curate and mask the evaluation subjects, once; return the folder of their tables."""
    tree = merged(experiment.params.tree(), experiment.matrix.world)
    named = digest([tree[name] for name in ("backbones", "toybox", "sources", "curate", "mask")], experiment.weights)
    folder = experiment.work / f"world-{named}"
    data = folder / "data"
    if not (data / "mask" / "summary.json").is_file():
        overlay = write_overlay(folder, tree)
        print(f"{experiment.name}: preparing evaluation subjects: render, curate, mask", flush=True)
        command(("toybox", "curate", "mask"), overlay, data, folder / "log.txt")
    plain = folder / f"plain-{digest(merged(tree, experiment.matrix.common)['generate'])}"
    if not (plain / "data" / "score" / "summary.json").is_file():
        of_prompt = {"generate": {"methods": [metrics.PROMPT_ONLY]}}
        overlay = write_overlay(plain, tree, experiment.matrix.common, of_prompt)
        print(f"{experiment.name}: images of the prompts alone, and scores of real photos", flush=True)
        tables_of = link(plain / "data", {stage: data / stage for stage in MEASURED_ON})
        for empty in ("train/adapter", "rivals/adapters"):
            (tables_of / empty).mkdir(parents=True, exist_ok=True)
        command(("generate", "score"), overlay, tables_of, folder / "log.txt")
    return link(data, {PLAIN: plain / "data" / "generate", SCORED: plain / "work" / "score"})


class Runner:
    """Trains and measures one job, in a folder of its own."""

    def __init__(self, job: SeededRun, bench: Path) -> None:
        """`bench`: the tables of the evaluation subjects."""
        self.job, self.bench = job, bench
        self.folder = job.experiment.work / f"{job.label}-{digest(job.settings, job.experiment.data)}"

    def __call__(self, measurements: Sequence[Wanted]) -> None:
        """Make measurements in order; each is recorded at once."""
        for wanted in measurements:
            begun = time.monotonic()
            adapter = self.trained(wanted.samples)
            trained = time.monotonic()
            found = self.measure(wanted, adapter)
            spent = {"train": trained - begun, "measure": time.monotonic() - trained}
            minutes = {name: round(seconds / 60, 1) for name, seconds in spent.items()}
            self.record(wanted, found | {"minutes": minutes})

    def trained(self, samples: int) -> Path:
        """The train stage's folder after so many samples; trained on from the number before."""
        job, experiment = self.job, self.job.experiment
        folder = self.folder / str(samples)
        data = link(folder / "data", self.tables())
        if not (data / "train" / "summary.json").is_file():  # written last
            batch = job.tree["train"]["batch"]
            overlay = write_overlay(folder, job.tree, {"train": {"steps": samples // batch}})
            before = [count for count in experiment.matrix.counts(job.name) if count < samples]
            words: list[str] = []
            if before:
                work = self.trained(before[-1]).parent.parent / "work"
                words = ["--resume", str(next(work.glob("train/*/recipe.json")).parent)]
            command(("train",), overlay, data, folder / "log.txt", *words)
        return data / "train"

    def tables(self) -> dict[str, Path]:
        """Where the tables are that it is trained on; those of encode are its own if its values say how."""
        job = self.job
        found = {stage: job.experiment.params.data / stage for stage in TRAINED_ON}
        if "encode" in job.run.params:
            own = self.folder / "tables"
            data = link(own / "data", {stage: place for stage, place in found.items() if stage != "encode"})
            found["encode"] = data / "encode"
            if not (data / "encode" / "summary.json").is_file():
                # The training world's sources, and not those of the evaluation.
                overlay = write_overlay(own, job.experiment.params.tree(), job.run.params)
                command(("encode",), overlay, data, self.folder / "log.txt")
        return found

    def measure(self, wanted: Wanted, adapter: Path) -> dict[str, Any]:
        """Sample and score one adapter at one point."""
        job = self.job
        folder = adapter.parent.parent / wanted.point
        read = (*MEASURED_ON, PLAIN)
        data = link(folder / "data", {stage: self.bench / stage for stage in read} | {"train": adapter})
        overlay = write_overlay(folder, job.tree, {"generate": wanted.generate})
        masked = merged(job.tree["generate"], wanted.generate)["location_masks"]
        views = wanted.own and not wanted.further
        probes = {"location": masked, "truth": True, "views": views}
        # What the oracles score is the same for all: their finished tasks need not be computed again.
        shutil.copytree(self.bench / SCORED, folder / "work" / "score", dirs_exist_ok=True)
        command(
            ("generate", "score", *(name for name, now in probes.items() if now)), overlay, data, folder / "log.txt"
        )
        made = {"scores": scores_of(data), "truth": read_json(data / "truth" / "metrics.json")}
        if wanted.own:
            made["train"] = read_json(adapter / "metrics.json")
        return made | ({"views": read_json(data / "views" / "metrics.json")} if views else {})

    def record(self, wanted: Wanted, found: dict[str, Any]) -> None:
        """Add a measurement to the job's result."""
        job = self.job
        header = {"run": job.name, "seed": job.seed, "data": job.experiment.data, "settings": job.settings}
        result: Result = job.recorded() or header | {"measured": []}
        key = {"samples": wanted.samples, "point": wanted.point}
        write_json(job.file, result | {"measured": [*result["measured"], key | found]})
        print(f"{job.experiment.name}: {job.label} after {wanted.samples:,} samples, {wanted.point}", flush=True)


def scores_of(data: Path) -> dict[str, dict[str, float]]:
    """Column of the published table -> the mean of each subject, by its own name, over the adapter's images."""
    rows = [row for row in tables.rows(data / "score", "scores") if row["method"] == metrics.MODEL]
    subjects = metrics.summary(rows, [], metrics.IntervalParams(resamples=1, level=0.95, seed=0))["subjects"]
    return {
        column: {subject.rsplit("/", 1)[-1]: values[metric][part] for subject, values in subjects.items()}
        for column, (metric, part) in metrics.HEADLINE.items()
    }


def main(words: Sequence[str]) -> None:
    parser = Parser(prog="python -m experiments.ablation", description=__doc__)
    parser.add_argument("runs", nargs="*", help="names of runs of the matrix (default: all)")
    parser.add_argument("--matrix", type=Path, default=FILE, help="file of the runs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, help="number of seeds of each run, the first ones (default: all)")
    parser.add_argument(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs in parallel (default: %(default)s)"
    )
    parser.add_argument("--document", action="store_true", help="only write the document from existing results")
    shared_options(parser)
    options = parser.parse_args(words)
    params, name = read_params(options), options.matrix.stem
    known = read_matrix(options.matrix).runs
    unknown = [run for run in options.runs if run not in known]
    if unknown:
        raise UserError(f"there is no run '{unknown[0]}' in {options.matrix.name}; choose from {', '.join(known)}")
    if options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}; give at least 1")
    if not options.document:
        photos = photos_digest(params.data)
        write_json(result_file(name, "photos"), {"digest": photos})
        with exclusive(name, WORK / name):
            run_missing(experiment_of(options.matrix, params, photos), options)
    print(f"{name}: {write_document(params)}")


def run_missing(experiment: Experiment, options: Any) -> None:
    """Make the missing measurements, several runs in parallel; the document is rewritten after each run.

    Raises:
        UserError: some runs failed; raised after all others have ended.
    """
    jobs = experiment.jobs(options.runs, options.seeds)
    missing = [job for job in jobs if job.missing()]
    left, whole = sum(len(job.missing()) for job in jobs), sum(len(job.wanted()) for job in jobs)
    print(f"{experiment.name}: {len(missing)} of {len(jobs)} runs to do, {left} of {whole} measurements", flush=True)
    if not missing:
        return
    bench, failed = prepare_world(experiment), []

    def work(job: SeededRun, further: bool) -> None:
        if job.label in failed:
            return
        try:
            wanted = [one for one in job.missing() if one.further == further]
            Runner(job, bench)(wanted)
            if wanted:
                write_document(experiment.params)
        except UserError as error:
            failed.append(job.label)
            print(f"{experiment.name}: {error}", file=sys.stderr, flush=True)

    # All that is compared comes before the rest of the learning curves.
    for further in (False, True):
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(work, missing, [further] * len(missing)))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(missing)} runs failed: {', '.join(sorted(failed))}; the others are done, see the "
            f"errors above"
        )
