"""CSV files beside photos: captions, boxes, consents, groups."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence

from pipelines.photos.roots import Root
from runtime.errors import UserError


def csv_header(root: Root, path: str) -> list[str]:
    """Return the names of the columns of a CSV file, none of an empty one.

    Raises:
        UserError: it is not CSV.
    """
    try:
        return _stripped(next(csv.reader(root.lines(path), strict=True), []))
    except csv.Error as error:
        raise _not_csv(root, path, 1, error) from None


def csv_rows(root: Root, path: str, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, values of `columns`) of a CSV file with a header, row by row.

    A column written `Name?` is optional; if absent, its cells are empty.

    Raises:
        UserError: a column is missing, a row has too few or too many cells, or a quote is left open; names file and
            line.
    """
    reader = csv.reader(root.lines(path), strict=True)
    begun = 1
    try:
        header = _stripped(next(reader, []))
        wanted = [_position(header, column, root.name(path)) for column in columns]
        begun = reader.line_num + 1
        for row in reader:
            short, long = len(row) < len(header), any(cell.strip() for cell in row[len(header) :])
            if row and (short or long):
                advice = "complete the row or replace the file" if short else "quote cells that have a comma"
                raise UserError(
                    f"{root.name(path)} line {reader.line_num} has {len(row)} of {len(header)} columns; {advice}"
                )
            if row:
                yield reader.line_num, [row[at] if at is not None else "" for at in wanted]
            begun = reader.line_num + 1
    except csv.Error as error:
        raise _not_csv(root, path, begun, error) from None


def _position(header: list[str], column: str, file: str) -> int | None:
    name = column.removesuffix("?")
    if name in header:
        return header.index(name)
    if column.endswith("?"):
        return None
    for separator, what in ((";", "semicolons"), ("\t", "tabs")):
        if name in [cell.strip() for cell in separator.join(header).split(separator)]:
            raise UserError(f"{file} has its columns separated by {what}; separate them by commas, as CSV")
    found = ", ".join(header) or "nothing"
    raise UserError(f"{file} has no column '{name}' (found: {found}); add it to the header line")


def _stripped(row: Sequence[str]) -> list[str]:
    return [cell.strip() for cell in row]


def _not_csv(root: Root, path: str, line: int, error: Exception) -> UserError:
    return UserError(f"{root.name(path)} line {line} is not CSV ({error}); close its quotes or replace the file")
