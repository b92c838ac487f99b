"""Compare runs side by side: scores, paired differences, images of the same prompts.

Each folder is laid out like `data` and has the outputs of the generate and score stages. All runs must share one
protocol and be scored in the same way.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.protocol.protocol import PAIR, RECONSTRUCTION
from eval.report.album import Album
from eval.report.sections.base import (
    ORACLES,
    Key,
    Missing,
    ReportParams,
    Sources,
    equally_spaced,
    images,
    intervals,
    key_of,
    made,
    name_of,
    read_json,
    scored,
)
from eval.report.sections.pictures import generated
from eval.report.stage import environment
from eval.score.metrics import HEADLINE, METRICS, MODEL, Estimate, IntervalParams, estimate, positions
from pipelines.photos.roots import Roots, SourceParams
from runtime.cli import read_params, shared_options
from runtime.errors import UserError
from runtime.files import write_text
from runtime.text import text_table

NOT_OF_A_MEASURE = {"id", "variant", "metrics", "intervals"}
"""Keys of the score stage's protocol.json in which runs may differ: only what both have is shown."""


@dataclass(frozen=True)
class ScoredRun:
    """The run in one folder."""

    name: str
    folder: Path
    protocol: dict[str, Any]
    """How its images were generated; `id` is the protocol id."""
    measured: dict[str, Any]
    """How they were scored."""
    summaries: dict[str, dict[str, Any]]


def read_run(name: str, folder: Path) -> ScoredRun:
    """Return the run in a folder.

    Raises:
        UserError: the generate or the score stage has not run there, the scores are of other images, or the model was
            not scored.
    """
    try:
        protocol = read_json(folder / "generate" / "protocol.json", "generate")
        measured, summaries = read_json(folder / "score" / "protocol.json", "score"), scored(folder)
    except Missing as stage:
        raise UserError(f"{folder} has no results of the {stage} stage; run it with --data {folder}") from None
    if measured.get("id") != protocol.get("id"):
        raise UserError(
            f"the scores in {folder} are of other images ({measured.get('id')}) than those there now "
            f"({protocol.get('id')}); run the score stage with --data {folder}"
        )
    if MODEL not in summaries:
        raise UserError(
            f"{folder} has no scores of method {MODEL}; list it in generate.methods, then run generate and score again"
        )
    return ScoredRun(name, folder, protocol, measured, summaries)


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the distinguishing parts of the paths: a and b for runs/a/data and runs/b/data."""
    paths = [folder.resolve().parts for folder in folders]
    front = back = 0
    while min(map(len, paths)) > front and len({parts[front] for parts in paths}) == 1:
        front += 1
    while min(map(len, paths)) > front + back and len({parts[-1 - back] for parts in paths}) == 1:
        back += 1
    return ["/".join(parts[front : len(parts) - back]) or parts[-1] for parts in paths]


def check_comparable(runs: Sequence[ScoredRun]) -> None:
    """Raise UserError, naming the keys, if two runs have different protocols or were scored differently."""
    first = runs[0]
    for other in runs[1:]:
        ids = [run.protocol.get("id") for run in (first, other)]
        if None in ids or ids[0] != ids[1]:
            asked = [flat(run.protocol.get("protocol", {}), "generate.protocol") for run in (first, other)]
            keys = [key for key in sorted(asked[0].keys() | asked[1].keys()) if asked[0].get(key) != asked[1].get(key)]
            keys += ["resolution"] if first.protocol.get("resolution") != other.protocol.get("resolution") else []
            what = ", ".join(keys) or "the subjects, photos or prompts themselves"
            raise UserError(
                f"{first.folder} and {other.folder} have different protocols ({ids[0]} and {ids[1]}), so their scores "
                f"are not comparable; they differ in {what}; generate and score both under one protocol"
            )
        of = [
            flat({key: value for key, value in run.measured.items() if key not in NOT_OF_A_MEASURE}, "score")
            for run in (first, other)
        ]
        keys = [key for key in sorted(of[0].keys() | of[1].keys()) if of[0].get(key) != of[1].get(key)]
        if keys:
            raise UserError(
                f"{first.folder} and {other.folder} were scored differently ({', '.join(keys)}); "
                f"score both with the same settings"
            )


def flat(tree: dict[str, Any], prefix: str) -> dict[str, str]:
    """Return the values of nested mappings as text, by dotted key."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else key
        found |= flat(value, name) if isinstance(value, dict) and value else {name: str(value)}
    return found


def differences(first: ScoredRun, other: ScoredRun, bootstrap: IntervalParams) -> dict[str, Estimate | None]:
    """Return other - first for each column of METRICS: the mean of the subjects' differences, with its interval.

    Paired by subject, since subjects differ more from each other than runs do. None if no subject has the column in
    both.
    """
    of = [run.summaries[MODEL]["subjects"] for run in (first, other)]
    found: dict[str, Estimate | None] = {}
    for column, (metric, part) in HEADLINE.items():
        values = [{s: v for s, by in run.items() if (v := by.get(metric, {}).get(part)) is not None} for run in of]
        common = sorted(values[0].keys() & values[1].keys())
        found[column] = estimate([values[1][subject] - values[0][subject] for subject in common], bootstrap)
    return found


def score_rows(runs: Sequence[ScoredRun]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, summary) of the model in each run, then of each oracle: once if it is the same in all runs that have
    it, as for real photos; prompt-only images depend on the sampler and the base model."""
    for run in runs:
        yield run.name, run.summaries[MODEL]
    for oracle in ORACLES:
        found = [(run.name, run.summaries[oracle]) for run in runs if oracle in run.summaries]
        if all(summary == found[0][1] for _, summary in found):
            found = found[:1]
        for run_name, summary in found:
            yield name_of(oracle) if len(found) == 1 else f"{name_of(oracle)} ({run_name})", summary


def position_rows(runs: Sequence[ScoredRun]) -> list[tuple[str, dict[str, float | None]]]:
    """Return (name, `metrics.positions` of the model) of each run that has scores of both ends."""
    found = [(run.name, positions(run.summaries).get(MODEL)) for run in runs]
    return [(name, of) for name, of in found if of is not None]


def settings(runs: Sequence[ScoredRun]) -> list[tuple[str, list[str]]]:
    """Return (key, value in each run) of the settings in which the runs differ."""
    of = [flat(run.protocol, "") for run in runs]
    keys = sorted({key for values in of for key in values})
    rows = [(key, [values.get(key, "–") for values in of]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def same_pictures(runs: Sequence[ScoredRun], album: Album, params: ReportParams) -> list[dict[str, Any]]:
    """Return the first image of some prompts in each run, prompts evenly spaced over their order."""
    by_run = [{key_of(row): row for row in made(run.folder) if row["method"] == MODEL} for run in runs]
    leave_out = (RECONSTRUCTION, PAIR)
    keys: list[Key] = [
        key
        for key, row in by_run[0].items()
        if row["index"] == 0 and row["group"] not in leave_out and all(key in rows for rows in by_run)
    ]
    chosen = equally_spaced(keys, params.subjects * 2)
    pngs = [images(run.folder, chosen) for run in runs]
    photos = album.photos({by_run[0][key]["reference"] for key in chosen})
    return [
        {
            "prompt": by_run[0][key]["prompt"],
            "group": by_run[0][key]["group"],
            "segment": album.segment(photos.get(by_run[0][key]["reference"])),
            "pictures": [generated(of[key], params.side) for of in pngs],
        }
        for key in chosen
    ]


def page(runs: Sequence[ScoredRun], sources: Sources) -> str:
    """Return the page comparing the runs; deterministic."""
    bootstrap, jinja = intervals(runs[0].folder / "score"), environment()
    jinja.tests["sure"] = is_sure
    return jinja.get_template("compare.html.j2").render(
        title=" and ".join(run.name for run in runs) if len(runs) == 2 else f"{len(runs)} runs",
        names=[run.name for run in runs],
        metrics=METRICS,
        rows=list(score_rows(runs)),
        positions=position_rows(runs),
        differences=[(other.name, differences(runs[0], other, bootstrap)) for other in runs[1:]],
        level=bootstrap.level,
        settings=settings(runs),
        protocol=runs[0].protocol["id"],
        pictures=same_pictures(runs, sources.album, sources.params),
    )


def text(runs: Sequence[ScoredRun]) -> str:
    """Return the tables as text."""
    bootstrap = intervals(runs[0].folder / "score")
    rows = [
        [name, *((values[column] or {}).get("mean") for column in METRICS), values["misses"]]
        for name, values in score_rows(runs)
    ]
    lines = [text_table(("run", *METRICS, "not found"), rows)]
    if places := position_rows(runs):
        lines.append("\n  position: 0 is prompt only, 1 is true renders; -: they are not clearly above it")
        lines.append(
            text_table(("run", *METRICS), [[name, *(of[column] for column in METRICS)] for name, of in places])
        )
    lines.append(f"\n  minus {runs[0].name}, paired by subject, {100 * bootstrap.level:.0f} % intervals; *: excludes 0")
    changes = [
        [other.name, *(_change(found[column]) for column in METRICS)]
        for other in runs[1:]
        for found in [differences(runs[0], other, bootstrap)]
    ]
    return "\n".join([*lines, text_table(("run", *METRICS), changes)])


def is_sure(found: Estimate | None) -> bool:
    """Whether the interval of a difference excludes 0."""
    if found is None or found["low"] is None or found["high"] is None:
        return False
    return found["low"] > 0 or found["high"] < 0


def _change(found: Estimate | None) -> str | None:
    if found is None:
        return None
    span = "" if found["low"] is None else f" [{found['low']:+.3f} {found['high']:+.3f}]"
    return f"{found['mean']:+.3f}{span}{'*' if is_sure(found) else ''}"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "runs", nargs="+", metavar="DATA", help="folders of runs; differences are relative to the first"
    )
    parser.add_argument("--out", metavar="FILE", help="also write an HTML page with the images side by side")
    shared_options(parser)


def main(options: argparse.Namespace) -> None:
    """Compare the runs.

    Raises:
        UserError: there are fewer than two, or they have no results, different protocols or different scoring settings.
    """
    folders = [Path(name) for name in options.runs]
    if len({folder.resolve() for folder in folders}) < max(len(folders), 2):
        raise UserError("name at least two different folders, such as data and another run's data")
    runs = [read_run(name, folder) for name, folder in zip(short_names(folders), folders, strict=True)]
    check_comparable(runs)
    print(text(runs))
    if options.out:
        params = read_params(options)
        report, roots = params.section("report", ReportParams), Roots(params.section("sources", list[SourceParams]))
        written = page(runs, Sources(folders[0], Album(folders[0], roots, report.side), report))
        write_text(Path(options.out), written)
        print(f"compare: {options.out}, {len(written.encode()) / 1e6:.1f} MB")
