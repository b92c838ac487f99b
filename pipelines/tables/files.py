"""Validated reading and writing of tables.

A table is a folder of `part-00000.parquet` files, sorted by the table's keys across and within parts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.tables.schema import TABLES
from runtime.errors import UserError

ROW_GROUP = 4096
"""Small enough that a reader of one subject decodes little, large enough to amortise Parquet's cost per group."""
PART_BYTES = 64 * 2**20
"""Keeps a table of millions of rows in few files, each still quick to read as a whole."""


class TableError(UserError):
    """A table is missing or a Parquet file does not match its schema."""


def from_rows(name: str, rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Return `rows` as a table sorted by its keys.

    Raises:
        TableError: a column is missing, unknown, null but not nullable, or of another type.
    """
    table_spec = TABLES[name]
    for row in rows:
        if row.keys() != table_spec.columns.keys():
            odd = sorted(row.keys() ^ table_spec.columns.keys())
            raise TableError(f"table {name}: a row lacks or adds the columns {', '.join(odd)}; see tables.TABLES")
    try:
        table = pa.Table.from_pylist(list(rows), schema=table_spec.schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise TableError(f"table {name}: {error}") from None
    return sort(name, table)


def path_order(identifier: str) -> list[str]:
    """Return the sort key of a path-like id: part by part, so that the contents of a subject sort with it."""
    return identifier.split("/")


def sort(name: str, table: pa.Table) -> pa.Table:
    """Return `table` sorted by the table's keys (ids in `path_order`) and checked against its schema."""
    keys = [table[key].to_pylist() for key in TABLES[name].keys]
    ranks = [[path_order(v) if isinstance(v, str) else v for v in column] for column in keys]
    order = sorted(range(table.num_rows), key=list(zip(*ranks, strict=True)).__getitem__)
    return check(name, table.take(pa.array(order, pa.int64())), f"table {name}")


def check(name: str, table: pa.Table, origin: str) -> pa.Table:
    """Return `table` if it has exactly the columns of table `name`; `origin` names it in errors."""
    for column, wanted in TABLES[name].columns.items():
        if column not in table.column_names:
            raise TableError(f"{origin}: column '{column}' is missing; run the stage that writes '{name}' again")
        found = table.schema.field(column).type
        if found != wanted.type:
            raise TableError(
                f"{origin}: column '{column}' is {found}, expected {wanted.type}; "
                f"run the stage that writes '{name}' again"
            )
    extra = [c for c in table.column_names if c not in TABLES[name].columns]
    if extra:
        raise TableError(f"{origin}: unknown column '{extra[0]}'; run the stage that writes '{name}' again")
    return no_nulls(name, table, origin)


def no_nulls(name: str, table: pa.Table, origin: str) -> pa.Table:
    """Return `table`, some or all columns of table `name`, if only nullable columns have nulls."""
    for column in table.column_names:
        if not TABLES[name].columns[column].nullable and table[column].null_count:
            raise TableError(f"{origin}: column '{column}' has nulls; run the stage that writes '{name}' again")
    return table


def write_part(file: Path, name: str, table: pa.Table) -> None:
    """Write `table` to `file` atomically; the same rows give the same bytes."""
    check(name, table, str(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        whole = table.cast(TABLES[name].schema).combine_chunks()  # otherwise Parquet's pages depend on the chunks
        pq.write_table(whole, stream, row_group_size=ROW_GROUP, compression="zstd")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


@contextlib.contextmanager
def replacing(folder: Path, name: str) -> Iterator[Callable[[int], Path]]:
    """Yield a function from part number to path of a new table; on exit without an error, it replaces the old one."""
    temporary = folder / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield lambda number: temporary / f"part-{number:05d}.parquet"
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.rename(folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write(folder: Path, name: str, table: pa.Table) -> None:
    """Write a whole table as one part under `folder/name`, replacing the old one."""
    with replacing(folder, name) as part:
        write_part(part(0), name, sort(name, table))


def write_parts(folder: Path, name: str, pieces: Iterable[pa.Table]) -> int:
    """Write a table of any length from `pieces` in key order, replacing the old one; memory holds one part.

    A part ends with the piece that fills it, so that the bytes depend only on the pieces. Return the number of rows.
    """
    total = number = size = 0
    empty = from_rows(name, [])
    held = [empty]
    with replacing(folder, name) as part:
        for piece in pieces:
            held.append(piece.cast(empty.schema))
            size += piece.nbytes
            total += piece.num_rows
            if size >= PART_BYTES:
                write_part(part(number), name, pa.concat_tables(held))
                number, held, size = number + 1, [empty], 0
        if len(held) > 1 or number == 0:
            write_part(part(number), name, pa.concat_tables(held))
    return total


def parts(folder: Path, name: str) -> list[Path]:
    """Return the part files of a table, in order.

    Raises:
        TableError: the table does not exist.
    """
    found = sorted((folder / name).glob("part-*.parquet"))
    if not found:
        raise TableError(f"{folder / name} holds no table '{name}'; run the stage that writes it ({folder.name}) first")
    return found


def read_part(file: Path, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return one part file, checked; only `columns`, if given."""
    with _opened(file, name) as parquet:
        table = parquet.read(columns=list(columns) if columns is not None else None)
    return no_nulls(name, table, str(file))


def read(folder: Path, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a whole table, checked, in key order.

    Raises:
        TableError: the table is missing, unreadable or has another schema; names file and column.
    """
    return pa.concat_tables([read_part(part, name, columns) for part in parts(folder, name)])


def stream(
    folder: Path, name: str, columns: Sequence[str] | None = None, size: int = 16 * ROW_GROUP
) -> Iterator[pa.Table]:
    """Yield a table `size` rows at a time, checked, in key order, without holding it as a whole."""
    for file in parts(folder, name):
        with _opened(file, name) as parquet:
            for batch in parquet.iter_batches(batch_size=size, columns=list(columns) if columns is not None else None):
                yield no_nulls(name, pa.Table.from_batches([batch]), str(file))


def rows(folder: Path, name: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table as dictionaries, holding one row group at a time."""
    for piece in stream(folder, name, columns, ROW_GROUP):
        yield from piece.to_pylist()


@contextlib.contextmanager
def _opened(file: Path, name: str) -> Iterator[pq.ParquetFile]:
    """Yield an open part file with its schema checked; errors while reading it name the file."""
    try:
        with pq.ParquetFile(file) as parquet:
            check(name, parquet.schema_arrow.empty_table(), str(file))
            yield parquet
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise TableError(f"{file} is not a readable Parquet file ({reason}); run its stage again") from None


def count(folder: Path, name: str) -> int:
    """Return how many rows a table has."""
    return sum(pq.read_metadata(part).num_rows for part in parts(folder, name))


def batches(folder: Path, name: str, columns: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
    """Yield `size` rows at a time of a table with large rows; a reader that stops early decodes no more."""
    for part in parts(folder, name):
        read_part(part, name, [])
        with pq.ParquetFile(part) as parquet:
            yield from parquet.iter_batches(batch_size=size, columns=list(columns))
