"""Compare methods side by side: scores, paired differences, images of the same prompts.

Each folder is laid out like `data` and has the outputs of the generate and score stages; each of its methods is a run.
All runs must share one protocol and be scored in the same way.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.protocol.protocol import PAIR, RECONSTRUCTION
from eval.report.album import Album
from eval.report.sections.base import (
    ORACLES,
    Missing,
    ReportParams,
    Sources,
    equally_spaced,
    images,
    intervals,
    made,
    name_of,
    read_json,
    scored,
)
from eval.report.sections.pictures import generated
from eval.report.stage import environment
from eval.score.metrics import HEADLINE, METRICS, PICTURE, Estimate, IntervalParams, estimate, positions
from pipelines.photos.roots import Roots, SourceParams
from runtime.cli import read_params, shared_options
from runtime.errors import UserError
from runtime.files import write_text
from runtime.text import text_table

NOT_OF_A_MEASURE = {"id", "prompts_id", "variant", "metrics", "intervals", "subject_groups"}
"""Keys of the score stage's protocol.json in which runs may differ: only what both have is shown."""


@dataclass(frozen=True)
class ScoredRun:
    """A method of one folder.

    place: the name of the folder among those compared.
    """

    name: str
    place: str
    folder: Path
    method: str
    protocol: dict[str, Any]
    """How its images were generated; `id` is the protocol id."""
    measured: dict[str, Any]
    """How they were scored."""
    summaries: dict[str, dict[str, Any]]
    """Of all methods in the folder."""

    @property
    def summary(self) -> dict[str, Any]:
        """The scores of the run."""
        return self.summaries[self.method]

    @property
    def imported(self) -> bool:
        """Whether its images were made elsewhere."""
        return self.method in self.protocol.get("imported", {})

    @property
    def made_how(self) -> dict[str, Any]:
        """What is recorded of how its images were made."""
        if self.imported:
            found = self.protocol["imported"][self.method]
            return {"made elsewhere": found | {"sizes": ", ".join(found.get("sizes", {}))}}
        return {key: value for key, value in self.protocol.items() if key != "imported"}


def read_runs(folders: Sequence[Path], methods: Sequence[str] = ()) -> list[ScoredRun]:
    """Return the runs in some folders: those of `methods`, or of all but the oracles.

    A run is called after its folder, its method, or both, whatever tells it apart.

    Raises:
        UserError: as `read_folder` does, a method was not scored in any folder, or there are fewer than two runs.
    """
    found = {
        (short, method): run
        for short, folder in zip(short_names(folders), folders, strict=True)
        for method, run in read_folder(folder).items()
    }
    every = {method for _, method in found}
    for method in methods:
        if method not in every:
            raise UserError(f"method '{method}' was not scored; choose from {', '.join(sorted(every))}")
    wanted = {key: run for key, run in found.items() if key[1] in (methods or every - {*ORACLES})}
    for folder in folders:
        if all(run.folder != folder for run in wanted.values()):
            what = " or ".join(methods) or "any method but oracles"
            raise UserError(f"{folder} has no scores of {what}; run the score stage there, or choose with --method")
    if len(wanted) < 2:
        raise UserError(
            f"{folders[0]} has scores of one method; score another beside it, or name another run's data folder too"
        )
    several = len({short for short, _ in wanted}) > 1, len({method for _, method in wanted}) > 1
    named = {(True, False): "{0}", (False, True): "{1}"}
    return [
        replace(run, place=short, name=named.get(several, "{0}: {1}").format(short, name_of(method)))
        for (short, method), run in wanted.items()
    ]


def read_folder(folder: Path) -> dict[str, ScoredRun]:
    """Return the runs in a folder by method, the oracles among them.

    Raises:
        UserError: the generate or the score stage has not run there, or the scores are of other images.
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
    return {
        method: ScoredRun(method, str(folder), folder, method, protocol, measured, summaries) for method in summaries
    }


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
            if first.imported or other.imported:
                check_prompts(first, other)
                continue
            asked = [flat(run.protocol.get("protocol", {}), "generate.protocol") for run in (first, other)]
            keys = [key for key in sorted(asked[0].keys() | asked[1].keys()) if asked[0].get(key) != asked[1].get(key)]
            keys += ["resolution"] if first.protocol.get("resolution") != other.protocol.get("resolution") else []
            what = ", ".join(keys) or "the subjects, photos or prompts themselves"
            raise UserError(
                f"{first.folder} and {other.folder} have different protocols ({ids[0]} and {ids[1]}), so their scores "
                f"are not comparable; they differ in {what}; generate and score both under one protocol"
            )
    for other in runs[1:]:
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


def check_prompts(first: ScoredRun, other: ScoredRun) -> None:
    """Raise UserError unless two runs, one of them made elsewhere, have the same photos and editing prompts."""
    ids = [run.measured.get("prompts_id") for run in (first, other)]
    if None in ids:
        folder = first.folder if ids[0] is None else other.folder
        raise UserError(f"{folder} was scored before prompts had an id; run the score stage with --data {folder} again")
    if ids[0] == ids[1]:
        return
    asked = [
        {(row["subject_id"], row["prompt"]) for row in made(run.folder) if row["group"] not in (RECONSTRUCTION, PAIR)}
        for run in (first, other)
    ]
    told = [
        f"{len(more)} prompts only in {run.folder}, such as '{min(more)[1]}' of {min(more)[0]}"
        for run, more in ((first, asked[0] - asked[1]), (other, asked[1] - asked[0]))
        if more
    ]
    raise UserError(
        f"{first.folder} and {other.folder} have images of different prompts or photos "
        f"({'; '.join(told) or 'the photos, or which of them an image is compared with'}), so their scores are not "
        f"comparable; score images of the same prompts beside the same photos"
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
    of = [run.summary["subjects"] for run in (first, other)]
    found: dict[str, Estimate | None] = {}
    for column, (metric, part) in HEADLINE.items():
        values = [{s: v for s, by in run.items() if (v := by.get(metric, {}).get(part)) is not None} for run in of]
        common = sorted(values[0].keys() & values[1].keys())
        found[column] = estimate([values[1][subject] - values[0][subject] for subject in common], bootstrap)
    return found


def score_rows(runs: Sequence[ScoredRun]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, summary) of each run, then of each oracle: once if it is the same in all folders that have it, as
    for real photos; prompt-only images depend on the sampler and the base model."""
    for run in runs:
        yield run.name, run.summary
    one_of_each = {run.folder: run for run in reversed(runs)}.values()
    for oracle in [name for name in ORACLES if all(run.method != name for run in runs)]:
        found = [(run.place, run.summaries[oracle]) for run in reversed(one_of_each) if oracle in run.summaries]
        if all(in_table(summary) == in_table(found[0][1]) for _, summary in found):
            found = found[:1]
        for folder, summary in found:
            yield name_of(oracle) if len(found) == 1 else f"{name_of(oracle)} ({folder})", summary


def in_table(summary: dict[str, Any]) -> list[Any]:
    """Return the values of a summary that the tables show."""
    return [summary[name] for name in (*METRICS, "pictures", "misses")]


def position_rows(runs: Sequence[ScoredRun]) -> list[tuple[str, dict[str, float | None]]]:
    """Return (name, `metrics.positions`) of each run whose folder has scores of both ends."""
    found = [(run.name, positions(run.summaries).get(run.method)) for run in runs]
    return [(name, of) for name, of in found if of is not None]


def settings(runs: Sequence[ScoredRun]) -> list[tuple[str, list[str]]]:
    """Return (key, value in each run) of the settings in which the runs differ."""
    of = [flat(run.made_how, "") for run in runs]
    keys = sorted({key for values in of for key in values})
    rows = [(key, [values.get(key, "–") for values in of]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def same_pictures(runs: Sequence[ScoredRun], album: Album, params: ReportParams) -> list[dict[str, Any]]:
    """Return the first image of some prompts in each run, prompts evenly spaced over their order."""
    by_run = [{place(row): row for row in made(run.folder) if row["method"] == run.method} for run in runs]
    leave_out = (RECONSTRUCTION, PAIR)
    keys = [
        key
        for key, row in by_run[0].items()
        if row["index"] == 0 and row["group"] not in leave_out and all(key in rows for rows in by_run)
    ]
    chosen = equally_spaced(keys, params.subjects * 2)
    pngs = [images(run.folder, [(run.method, *key) for key in chosen]) for run in runs]
    shown = {key: min((of[key] for of in by_run), key=lambda row: not row["reference_known"]) for key in chosen}
    photos = album.photos({row["reference"] for row in shown.values()})
    return [
        {
            "prompt": shown[key]["prompt"],
            "group": shown[key]["group"],
            "segment": album.segment(photos.get(shown[key]["reference"])),
            "reference_known": shown[key]["reference_known"],
            "pictures": [generated(of[(run.method, *key)], params.side) for run, of in zip(runs, pngs, strict=True)],
        }
        for key in chosen
    ]


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the key of an image within a run."""
    return tuple(row[name] for name in PICTURE)


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
        same_noise=not any(run.imported for run in runs),
    )


def text(runs: Sequence[ScoredRun]) -> str:
    """Return the tables as text."""
    bootstrap = intervals(runs[0].folder / "score")
    rows = [
        [name, *((values[column] or {}).get("mean") for column in METRICS), values["pictures"], values["misses"]]
        for name, values in score_rows(runs)
    ]
    lines = [text_table(("run", *METRICS, "images", "not found"), rows)]
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
        "runs", nargs="+", metavar="DATA", help="folders of scores; differences are relative to the first method"
    )
    parser.add_argument(
        "--method", action="append", default=[], metavar="NAME", help="only these methods (default: all but oracles)"
    )
    parser.add_argument("--out", metavar="FILE", help="also write an HTML page with the images side by side")
    shared_options(parser)


def main(options: argparse.Namespace) -> None:
    """Compare the runs.

    Raises:
        UserError: there are fewer than two, a folder is named twice, or they have no results, different protocols or
            different scoring settings.
    """
    folders = [Path(name) for name in options.runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a folder is named twice; name different ones, such as data and another run's data")
    runs = read_runs(folders, options.method)
    check_comparable(runs)
    print(text(runs))
    if options.out:
        params = read_params(options)
        report, roots = params.section("report", ReportParams), Roots(params.section("sources", list[SourceParams]))
        written = page(runs, Sources(folders[0], Album(folders[0], roots, report.side), report))
        write_text(Path(options.out), written)
        print(f"compare: {options.out}, {len(written.encode()) / 1e6:.1f} MB")
