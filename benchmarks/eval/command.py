"""Measure the overhead of scoring relative to the models' own forward passes.

Prints one line per figure; exits 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import forwards
from benchmarks.eval import pictures
from benchmarks.measure import Line, chosen_parts, measured, ratio, report
from eval.score.scorer import ScoreParams, Scorer, load_finder, load_scorer
from eval.score.segmentation import Row, SubjectFinder
from eval.score.stage import asked_in, works
from eval.score.views import ScoringWork
from model.backbones.variant import Variant, load_variant
from runtime.cli import read_params, shared_options
from runtime.errors import UserError
from runtime.params import RunParams

GOAL = 0.85
PHOTOS = 5  # per subject, the average in DreamBench


@dataclass(frozen=True)
class EvalSetting:
    """Settings and sizes of the measurements."""

    params: ScoreParams
    run: RunParams
    variant: Variant
    folder: Path
    """Of the photos; temporary."""
    subjects: int
    pictures: int
    """Per subject."""
    seeds: int
    """Images per prompt."""
    side: int
    """px, of images and photos."""
    repeats: int


def segment(setting: EvalSetting) -> Iterator[Line]:
    """Grounded SAM on generated images, each of which gets a box."""
    finder, made = finder_of(setting), [rows for _, rows in world(setting)]

    def work() -> None:
        for rows in made:
            finder(rows)

    yield over_forwards("segment over forward", work, sum(map(len, made)), setting)


def score(setting: EvalSetting) -> Iterator[Line]:
    """All metrics of the generated images and of both oracles."""
    finder, everything = finder_of(setting), world(setting)
    subjects, made = [subject for subject, _ in everything], [rows for _, rows in everything]
    found = [row for rows in made for row in finder(rows)]
    todo = list(works(subjects, asked_in(row for rows in made for row in rows), made, found, False, setting.params))
    run, roots = setting.run, pictures.roots(setting.folder)
    scorer = load_scorer(setting.params, setting.variant, roots, run.torch_device(), run.decoders)
    yield over_forwards("score over forward", lambda: score_all(scorer, todo), sum(map(len, made)), setting)


def score_all(scorer: Scorer, todo: list[ScoringWork]) -> None:
    """Compute all rows from scratch, without cached vectors."""
    scorer.forget()
    for work in todo:
        for name in scorer.params.metrics:
            scorer((work, name))


def finder_of(setting: EvalSetting) -> SubjectFinder:
    """Return the score stage's segmenter without a detection threshold, so that SAM runs on every image."""
    params, run = setting.params.model_copy(update={"min_detection": 0.0}), setting.run
    return load_finder(params, setting.variant, run.torch_device(), run.decoders)


def world(setting: EvalSetting) -> list[tuple[Any, list[Row]]]:
    """Return subjects with their generations."""
    subjects = [pictures.subject(number, PHOTOS, setting.side, setting.folder) for number in range(setting.subjects)]
    return [
        (subject, pictures.generations(subject, setting.pictures, setting.seeds, setting.side)) for subject in subjects
    ]


def over_forwards(name: str, work: Callable[[], None], count: int, setting: EvalSetting) -> Line:
    """Return the throughput of `work` over that of its forward passes alone."""
    work()  # loads the models
    calls = forwards.record(work)
    return ratio(name, work, lambda: forwards.replay(calls), count, "image", GOAL, setting.repeats)


PARTS: dict[str, Callable[[EvalSetting], Iterator[Line]]] = {"segment": segment, "score": score}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timing repeats, of which the median counts (default: %(default)s)"
    )
    parser.add_argument("--subjects", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--pictures", type=int, default=104, help="images per subject, as published (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=4, help="images per prompt (default: %(default)s)")
    parser.add_argument("--side", type=int, help="side of the images, px (default: the variant's resolution)")
    parser.add_argument("--json", type=Path, default=Path(".work/bench/eval.json"), help="default: %(default)s")
    shared_options(parser)


def main(options: argparse.Namespace) -> int:
    """Measure the chosen parts; return the exit code."""
    chosen = chosen_parts(options.parts, PARTS)
    found = read_params(options)
    params, run, variant = found.section("score", ScoreParams), found.run, load_variant(found.variant)
    sizes = {name: getattr(options, name) for name in ("subjects", "pictures", "seeds", "repeats")}
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"--{name} is {value}; give at least 1")
    torch.set_num_threads(params.threads)  # as in the stage: the other cores decode
    with tempfile.TemporaryDirectory() as folder:
        setting = EvalSetting(params, run, variant, Path(folder), side=options.side or variant.resolution, **sizes)
        lines = measured(line for part in chosen for line in PARTS[part](setting))
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "device": run.torch_device()}
    asked = {"parts": chosen, "variant": variant.name, "metrics": list(params.metrics), "side": setting.side, **sizes}
    return report(lines, options.json, machine, asked)
