"""Delete a person, or any subject, from what was made of its photos: tables, caches, generated images, exports.

`customcontrast forget portraits/woman/anna` names subjects as the column subject_id does, or people of stage
selfaugment by name or as the column person does. Killed, it is run again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from glob import escape
from pathlib import Path

from pipelines import tables
from pipelines.engine import driver
from pipelines.engine.work import RECORD, is_url
from pipelines.forget.rows import mentions, names, without
from pipelines.selfaugment.people import NamedPerson
from runtime.cli import read_params, shared_options
from runtime.errors import UserError
from runtime.files import write_text
from runtime.params import Params
from runtime.stages import stages

EXPORT = "export-pairs"
CLAIM = ".export.json"
"""File that marks the folder of an export."""
IMAGES = "images"
"""Folder of layout `generated`, with a folder for each person."""
DERIVED = ("train/arrays", "train/*/samples")
"""Folders of a training's work that hold photos' features, or show subjects, of all together."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("subjects", nargs="+", metavar="SUBJECT", help="as in the column subject_id of table frames")
    parser.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="DIR",
        help="folder that export-pairs wrote; deleted as a whole",
    )
    shared_options(parser)


def main(options: argparse.Namespace) -> None:
    """Delete the subjects, and print what was removed and what is out of reach.

    Raises:
        UserError: nothing names a subject, a stage is running, or --export is no export.
    """
    params = read_params(options)
    subjects = tuple(dict.fromkeys(name.strip("/") for name in options.subjects))
    exports = [export_folder(place) for place in options.export]
    with contextlib.ExitStack() as held:
        for stage in (*stages(), EXPORT):
            if (params.data / stage).is_dir():
                held.enter_context(driver.sole_writer(stage, params.run, params.data / stage))
        photos = photos_of(params, subjects)
        found, exported = forget(params, subjects), bool(exports)
        for folder in exports:
            shutil.rmtree(folder)
            found[f"{folder}: the whole export"] += 1
    if not found:
        raise UserError(
            f"nothing in {params.data} or {params.run.work} names {' or '.join(subjects)}; customcontrast show frames"
            " prints each photo's subject_id"
        )
    for what, count in found.items():
        print(f"forget: {what}" + (f", {count} rows" if count > 1 else ""))
    for sentence in (*photos, *out_of_reach(params, exported)):
        print(f"forget: not deleted: {sentence}")


def forget(params: Params, subjects: Collection[str]) -> Counter[str]:
    """Delete the subjects below the data and the work folder; return {what: rows} of what was removed.

    Caches go first and the frames last, so that a run that was killed still finds the photos.
    """
    found: Counter[str] = Counter()
    people = {name for subject in subjects for name in known_as(subject)}
    roots = [params.data] if is_url(params.run.work) else [Path(params.run.work), params.data]
    for root in roots:
        found.update(forget_caches(root, people))
        found.update(forget_pictures(root, people))
        found.update(forget_tables(root, people))
    if found:
        for root in roots:
            found.update(forget_derived(root, params.data))
    return found


def known_as(subject: str) -> set[str]:
    """Return all that names a subject, as `names` takes it: of one that selfaugment made pictures of also the person's
    id, which is made of the name.

    Not looked up in a table, where a run that was killed may have deleted it.
    """
    last = subject.rpartition("/")[2]
    return {subject, f"/{NamedPerson(subject, '').id}"} | (
        {f"/{last}"} if re.fullmatch("[0-9a-f]{12}", last) else set()
    )


def forget_caches(root: Path, subjects: Collection[str]) -> Iterator[str]:
    """Delete finished shards and tasks that hold one of the subjects; the next run computes them again."""
    for record in sorted(root.rglob(RECORD)):
        shard = record.parent
        if any(names(item_id, subjects) for item_id, *_ in json.loads(record.read_text(encoding="utf-8"))["items"]):
            shutil.rmtree(shard)
            yield f"{shard.parent.parent}: finished work"
    for file in parquet_files(root):
        alone = not file.name.startswith("part-") and not (file.parent / RECORD).exists()
        if alone and mentions(file, subjects):
            file.unlink()
            yield f"{file.parent.parent}: finished work"


def forget_pictures(root: Path, subjects: Collection[str]) -> Iterator[str]:
    """Delete generated photos of the subjects, and lines of CSV files that name them."""
    for subject in subjects:
        for folder in sorted(root.glob(f"selfaugment/generated/*/{IMAGES}/{escape(subject.lstrip('/'))}")):
            shutil.rmtree(folder)
            yield f"{folder}"
    plots = [file for name, stage in stages().items() for plot in stage.plots for file in root.glob(f"{name}/{plot}")]
    for file in (*plots, *sorted(root.glob("selfaugment/generated/*/*.csv"))):
        header, *lines = list(csv.reader(io.StringIO(file.read_text(encoding="utf-8"), newline=""))) or [[]]
        kept = [row for row in lines if not any(names(cell, subjects) for cell in row)]
        if len(kept) < len(lines):
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([header, *kept])
            write_text(file, text.getvalue())
            yield from [f"{file}"] * (len(lines) - len(kept))


def forget_tables(root: Path, subjects: Collection[str]) -> Counter[str]:
    """Rewrite each part of a table that names a subject, as a whole; return {table: rows}."""
    found: Counter[str] = Counter()
    parts = [
        file for file in parquet_files(root) if file.name.startswith("part-") and file.parent.name in tables.TABLES
    ]
    for file in sorted(parts, key=lambda part: (part.parent.name == "frames", part)):
        name = file.parent.name
        if mentions(file, subjects):
            left, count = without(name, tables.read_part(file, name), subjects)
            tables.write_part(file, name, left)
            found[f"table {file.parent}"] += count
    return found


def forget_derived(root: Path, data: Path) -> Iterator[str]:
    """Delete what shows or holds several subjects together and is made anew: the report, and a training's caches."""
    if root == data and (data / "report").is_dir():
        shutil.rmtree(data / "report")
        yield f"{data / 'report'}: the whole report"
    for name in DERIVED:
        for folder in sorted(place for place in root.glob(f"**/{name}") if place.is_dir()):
            shutil.rmtree(folder)
            yield f"{folder}: of all subjects"


def parquet_files(root: Path) -> list[Path]:
    """Return the Parquet files below a folder, without those behind links and half-written ones."""
    return sorted(file for file in root.rglob("*.parquet") if not file.name.startswith("."))


def photos_of(params: Params, subjects: Collection[str]) -> list[str]:
    """Return a sentence for each subject whose photos the frames table knows: they are the user's own."""
    folder = params.data / "curate"
    if not (folder / "frames").is_dir():
        return []
    frames = tables.read(folder, "frames", ["subject_id", "source", "path"])
    counts: Counter[tuple[str, str, str]] = Counter()
    for row in frames.to_pylist():
        if names(row["subject_id"], subjects):
            counts[row["subject_id"], row["source"], str(Path(row["path"]).parent)] += 1
    return [
        f"{count} photos of {subject} in {place} of source {source}; delete them, or curate reads them again"
        for (subject, source, place), count in counts.items()
    ]


def out_of_reach(params: Params, exported: bool) -> Iterator[str]:
    """Yield a sentence for each place that may still hold something of the subjects."""
    roots = [params.data] if is_url(params.run.work) else [params.data, Path(params.run.work)]
    adapters = sorted({str(file.parent) for root in roots for file in root.rglob("adapter.json")})
    if adapters:
        yield f"what adapters learned: {', '.join(adapters)}; delete those that were trained with it, and train again"
    checkpoints = sorted({str(place.parent) for root in roots for place in root.glob("**/train/*/step-*")})
    if checkpoints:
        yield f"the same in checkpoints: {', '.join(checkpoints)}"
    if is_url(params.run.work):
        yield f"finished work in {params.run.work}; delete it there"
    if (params.data / EXPORT).is_dir() and not exported:
        yield "pairs that export-pairs wrote; name each folder with --export, and delete copies of them"
    if Path(".dvc/cache").is_dir():
        yield "earlier tables in DVC's cache; dvc gc --workspace deletes them"
    yield "copies, hubs and other --data folders; give each of your own with --data"


def export_folder(place: str) -> Path:
    """Return the folder of an export.

    Raises:
        UserError: it is none.
    """
    folder = Path(place).expanduser()
    if not (folder / CLAIM).is_file():
        raise UserError(f"--export {place} is no folder that {EXPORT} wrote: it has no {CLAIM}; correct it")
    return folder
