"""Groups of subjects, such as skin tones: `groups.csv` at the root of a source, so that scores can be told by them."""

from __future__ import annotations

from collections.abc import Iterable

from eval.protocol.protocol import HeldOutSubject
from pipelines.photos.listings import csv_header, csv_rows
from pipelines.photos.roots import Root, Roots
from runtime.errors import UserError

FILE = "groups.csv"
SubjectGroups = dict[str, dict[str, list[str]]]
"""By column of the file and value in it, the subject_ids."""


def subject_groups(roots: Roots, subjects: Iterable[HeldOutSubject]) -> SubjectGroups:
    """Return the groups of the subjects, from the files at the roots of their sources.

    The file's column `subject` has ids without the source's name; each other column is a way to group them. A subject
    without a row, or with an empty cell, is in no group.

    Raises:
        UserError: a file is malformed, or none of its rows is of a subject.
    """
    by_source: dict[str, dict[str, str]] = {}
    for subject in subjects:
        source = subject.photos[0].source
        by_source.setdefault(source, {})[subject.subject_id.removeprefix(f"{source}/")] = subject.subject_id
    found: SubjectGroups = {}
    for source, ids in by_source.items():
        root = roots[source]
        if not root.exists(FILE):
            continue
        columns, rows = _read(root)
        if not ids.keys() & rows.keys():
            raise UserError(
                f"{root.name(FILE)} has no row of an evaluated subject, such as '{min(ids)}'; correct column subject"
            )
        for name in sorted(ids.keys() & rows.keys()):
            for column, value in zip(columns, rows[name], strict=True):
                if value:
                    found.setdefault(column, {}).setdefault(value, []).append(ids[name])
    return {column: {value: sorted(ids) for value, ids in sorted(of.items())} for column, of in found.items()}


def _read(root: Root) -> tuple[list[str], dict[str, list[str]]]:
    """The columns besides `subject`, and {subject: their values}."""
    file, header = root.name(FILE), csv_header(root, FILE)
    columns = [name for name in header if name != "subject"]
    if len(header) - len(columns) != 1 or not all(columns) or not columns or len({*columns}) < len(columns):
        raise UserError(f"{file} has the columns {', '.join(header) or 'nothing'}; write subject and the groups'")
    rows: dict[str, list[str]] = {}
    for line, (subject, *values) in csv_rows(root, FILE, ["subject", *columns]):
        if subject.strip() in rows:
            raise UserError(f"{file} line {line} has '{subject.strip()}' again; remove one of the rows")
        rows[subject.strip()] = [value.strip() for value in values]
    return columns, rows
