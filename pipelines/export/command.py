"""Write the pairs of the pairs stage in the format of another trainer.

`customcontrast export-pairs --format webdataset --out exports/pairs`
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from model.backbones.variant import load_variant
from pipelines import tables
from pipelines.engine import driver
from pipelines.engine.work import WorkFolder
from pipelines.export import options as given
from pipelines.export import plan, render
from pipelines.export.card import CARD, LICENCES, SHEET, card, sheet
from pipelines.export.counts import ExportCounts
from pipelines.export.destination import Destination
from pipelines.export.formats import FORMATS, Format
from pipelines.export.options import ExportOptions
from pipelines.export.plan import Survey
from pipelines.export.worker import ExportWorker
from pipelines.photos import licences
from pipelines.photos.roots import Roots, SourceParams
from runtime.cli import read_params, shared_options
from runtime.closure import code_digest
from runtime.digest import digest
from runtime.errors import UserError
from runtime.params import Params

NAME = "export-pairs"
CLAIM = ".export.json"
"""Names the export that a folder holds; hidden, so that no reader takes it for data."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    formats = "\n".join(f"  {name:12} {form.summary}" for name, form in FORMATS.items())
    parser.epilog = f"formats:\n{formats}\n\ndocs/pairs.md shows the files of each and what reads them."
    parser.add_argument("--format", required=True, choices=tuple(FORMATS), help="listed below")
    parser.add_argument("--out", required=True, help="folder or fsspec URL, empty or of the same export unfinished")
    given.arguments(parser)
    shared_options(parser)


def main(options: argparse.Namespace) -> None:
    """Export the pairs of `--data`.

    Raises:
        UserError: an option is invalid, there is no pair, or the folder holds something else.
    """
    params = read_params(options)
    export_pairs(
        params, FORMATS[options.format], given.read(options, load_variant(params.variant).resolution), options.out
    )


def export_pairs(params: Params, form: Format, options: ExportOptions, out: str) -> None:
    """Write an export, or resume it.

    Raises:
        UserError: the format has no place for what the options ask, there is no pair, or the folder holds something
            else.
    """
    form.check(options)
    sources, data, run = params.section("sources", list[SourceParams]), params.data, params.run
    destination, folder = Destination(out), params.data / NAME
    with driver.sole_writer(NAME, run, folder):
        survey = survey_of(data, options)
        identity = digest(form.name, options.plain(), survey.digest, code_digest("pipelines.export.worker"))
        place = [identity, destination.url]
        if claim(destination, out, identity):
            # Shards of an export whose folder is gone are not there any more.
            WorkFolder(run.work, NAME, digest(NAME, place)).clear()
        summary = driver.run_stage(
            NAME,
            plan.read(data, options),
            partial(ExportWorker, form.name, options, sources, destination.url, run.decoders),
            identity=place,
            kept="exports",
            others=[],
            out=folder,
            run=run,
            shard_items=1,
        )
        check_files(destination, folder, out)
        counts = ExportCounts.of(data, folder, survey)
        finish(destination, folder, form, options, counts)
        examples = sheet([render.render(Roots(sources), pair, options) for pair in survey.examples])
        destination.write(SHEET, [render.encoded(examples, ExportOptions(size=0))[1]])
        destination.write(CARD, [card(form, options, counts, identity).encode()])
        destination.sweep()
        driver.report(NAME, summary, folder, counts.plain() | {"export": identity}, "pair")
    print(f"{NAME}: {_listed(counts.pairs)} pairs in {out}; {CARD} says how to read them")
    if warning := licences.warning(counts.single_licences(), run.purpose, shared=True, unit="pairs"):
        print(f"{NAME}: {warning}")


def survey_of(data: Path, options: ExportOptions) -> Survey:
    """Return the totals of an export.

    Raises:
        UserError: there is no pair to export.
    """
    left_out = Counter[str]()
    survey = Survey.of(plan.read(data, options, left_out), left_out)
    if not survey.parts:
        reasons = f" ({_listed(left_out)})" if left_out else ""
        raise UserError(
            f"the triplets in {data / 'pairs'} make no pair{reasons}; photograph subjects from several sides, and run"
            " the stages curate to pairs on them"
        )
    print(f"{NAME}: {_listed(survey.pairs)} pairs of {sum(survey.subjects.values())} subjects", flush=True)
    for reason, count in sorted(left_out.items()):
        print(f"  {count:6d} triplets left out, {reason}: {plan.LEFT_OUT[reason]}")
    return survey


def claim(destination: Destination, out: str, identity: str) -> bool:
    """Mark the folder as that of an export; return whether it was empty.

    Raises:
        UserError: it holds something else, or another export.
    """
    destination.sweep()
    found = destination.read(CLAIM)
    if found is None:
        if not destination.is_empty():
            raise UserError(f"--out {out} holds files that are no export; name a new folder")
        destination.write(CLAIM, [json.dumps({"export": identity}).encode()])
        return True
    if json.loads(found)["export"] != identity:
        raise UserError(
            f"--out {out} holds an export of other tables, with other options or by another version of this program;"
            " name a new folder or remove it"
        )
    return False


def check_files(destination: Destination, folder: Path, out: str) -> None:
    """Check that the last file of each shard is there, as it was when a run that was killed had written it.

    Raises:
        UserError: one is missing.
    """
    rows = tables.rows(folder, "exports", ["split", "part", "file"])
    for _, part in groupby(rows, key=lambda row: (row["split"], row["part"])):
        *_, last = (row["file"] for row in part)
        if not destination.has(last):
            raise UserError(f"{out}/{last} was removed; remove the folder and run the same command again")


def finish(destination: Destination, folder: Path, form: Format, options: ExportOptions, counts: ExportCounts) -> None:
    """Write what lists the pairs of each split, and further files of the format."""
    splits = [split for split in plan.SPLITS if counts.pairs[split]]
    for split in splits:
        for name, chunks in form.index(split, entries(folder, split), options):
            destination.write(name, chunks)
    for name, text in form.settings(splits, options):
        destination.write(name, [text.encode()])
    if counts.credited():
        destination.write(LICENCES, credits_of(folder))


def entries(folder: Path, split: str) -> Iterator[str]:
    """Yield what the format's index says of each pair of a split, in order."""
    return (row["entry"] for row in tables.rows(folder, "exports", ["split", "entry"]) if row["split"] == split)


def credits_of(folder: Path) -> Iterator[bytes]:
    """Yield a CSV file of licences and attributions: a row for each combination that a subject's pairs have."""
    columns = ["subject_id", "licence", "attribution"]
    yield _csv_line(["subject", *columns[1:]])
    for _, group in groupby(tables.rows(folder, "exports", columns), key=lambda row: row["subject_id"]):
        for row in dict.fromkeys(tuple(pair[name] for name in columns) for pair in group):
            yield _csv_line(["" if value is None else value for value in row])


def _csv_line(cells: list[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def _listed(counts: Any) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
