"""Print rows of a table, one field per line.

`customcontrast show masks --where quality=border --rows 3`
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines import tables
from runtime.cli import nearest
from runtime.errors import UserError
from runtime.text import text_table

WIDTH = 88
"""Maximum characters of a value; longer ones are truncated."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("table", nargs="?", help="name, or stage/name if several stages have it (default: list all)")
    parser.add_argument("--rows", type=int, default=5, metavar="N", help="number of rows (default: %(default)s)")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="rows to skip first (default: 0)")
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="rows with this value")
    parser.add_argument("--columns", metavar="A,B", help="only these columns, as a table")
    parser.add_argument("--meaning", action="store_true", help="print the meaning of each column instead of rows")
    parser.add_argument("--data", default="data", metavar="DIR", help="folder of the tables (default: %(default)s)")


def main(options: argparse.Namespace) -> None:
    """Print the rows.

    Raises:
        UserError: there is no such table, column, or number of rows.
    """
    data = Path(options.data).expanduser()
    if options.rows < 1 or options.skip < 0:
        raise UserError(f"--rows {options.rows} --skip {options.skip}: rows must be at least 1 and skip at least 0")
    if options.table is None:
        rows = [(f"{folder.name}/{name}", tables.count(folder, name)) for folder, name in found(data)]
        if not rows:
            raise UserError(f"{data} holds no table; run a stage first, such as `dvc repro curate`")
        print(text_table(("table", "rows"), rows))
        return
    folder, name = place(data, options.table)
    columns = chosen_columns(name, options.columns)
    if options.meaning:
        print(f"{name}: a row is {tables.spec(name).row}")
        print("\n".join(f"  {column:24} {tables.spec(name).columns[column].meaning}" for column in columns))
        return
    shown = list(islice(matching(folder, name, columns, options.where), options.skip, options.skip + options.rows))
    if options.columns:
        print(text_table(columns, [[text(row[column]) for column in columns] for row in shown]))
        return
    for row in shown:
        print("\n".join(f"{column:24} {text(row[column])}" for column in columns), end="\n\n")
    total = tables.count(folder, name)
    print(f"{len(shown)} of the {total} rows of {folder.name}/{name}{' that match' if options.where else ''}")


def found(data: Path) -> Iterator[tuple[Path, str]]:
    """Yield the folder and name of each table under `data`."""
    for part in sorted({file.parent for file in data.glob("*/*/part-*.parquet")}):
        if part.name in tables.TABLES:
            yield part.parent, part.name


def place(data: Path, asked: str) -> tuple[Path, str]:
    """Return the folder and name of the requested table.

    Raises:
        UserError: there is none, or several stages have one of this name.
    """
    there = list(found(data))
    fits = [(folder, name) for folder, name in there if asked in (name, f"{folder.name}/{name}")]
    if not fits:
        hint = nearest(asked, [name for _, name in there])
        raise UserError(f"{data} holds no table '{asked}'{hint or '; `customcontrast show` lists all tables'}")
    if len(fits) > 1:
        names = ", ".join(f"{folder.name}/{name}" for folder, name in fits)
        raise UserError(f"several stages have a table '{asked}'; name one of {names}")
    return fits[0]


def chosen_columns(name: str, asked: str | None) -> list[str]:
    """Return the requested columns of a table; all if none is named.

    Raises:
        UserError: there is no such column.
    """
    known = list(tables.spec(name).columns)
    wanted = [column.strip() for column in asked.split(",")] if asked else known
    for column in wanted:
        if column not in known:
            raise UserError(f"table {name} has no column '{column}'{nearest(column, known)}; it has {', '.join(known)}")
    return wanted


def matching(folder: Path, name: str, columns: list[str], where: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows that match all conditions, each written as `column=value`."""
    wanted = {}
    for condition in where:
        column, equals, value = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition}: write COLUMN=VALUE, as in class_name=mug")
        wanted[chosen_columns(name, column)[0]] = value
    for row in tables.rows(folder, name, list(dict.fromkeys([*columns, *wanted]))):
        if all(str(row[column]) == value for column, value in wanted.items()):
            yield row


def text(value: Any) -> str:
    """Return a value as one short line; bytes and long lists show their length."""
    if value is None:
        return "-"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, list) and len(value) > 9:
        return f"[{', '.join(text(item) for item in value[:3])}, ... {len(value)} values]"
    if isinstance(value, list):
        return f"[{', '.join(map(text, value))}]"
    line = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."
