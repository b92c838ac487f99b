"""A table without a subject's rows, and where a table or cache names a subject at all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

LISTS = {"neighbours": ("neighbours", "cosines"), "similarity": ("row_subjects", "column_subjects")}
"""Tables whose rows are of several subjects, and the columns that name them or go with them."""


def names(value: str, subjects: Iterable[str]) -> bool:
    """Whether an id or path is that of one of the subjects, or of something of it.

    subjects: how ids begin; with a slash before it, a part that may stand anywhere in them.
    """
    return any(
        f"{subject}/" in f"/{value}/" if subject[0] == "/" else f"{value}/".startswith(f"{subject}/")
        for subject in subjects
    )


def is_named(column: pa.ChunkedArray, subjects: Iterable[str]) -> pa.ChunkedArray:
    """Return `names` of each text in a column; a null names nobody."""
    found = pa.chunked_array([pa.array(np.zeros(len(column), dtype=bool))])
    inside = pc.binary_join_element_wise("/", column, "/", "")
    for subject in subjects:
        wanted = f"{subject}/" if subject[0] == "/" else f"/{subject}/"
        own = (pc.match_substring if subject[0] == "/" else pc.starts_with)(inside, wanted)
        found = pc.or_(found, pc.fill_null(own, False))
    return found


def mentions(file: Path, subjects: Collection[str]) -> bool:
    """Whether a Parquet file names one of the subjects; reads its text columns only."""
    with pq.ParquetFile(file) as parquet:
        texts = [field.name for field in parquet.schema_arrow if "string" in str(field.type)]
        table = parquet.read(columns=texts)
    columns = [pc.list_flatten(c) if pa.types.is_list(c.type) else c for c in table.columns]
    return any(pc.any(is_named(column, subjects)).as_py() for column in columns)


def without(name: str, table: pa.Table, subjects: Collection[str]) -> tuple[pa.Table, int]:
    """Return table `name` without what it says of the subjects, and how many rows were removed or changed.

    A row is removed if any text column names one; in tables of several subjects a row only loses their entries.
    """
    gone = pa.chunked_array([pa.array(np.zeros(len(table), dtype=bool))])
    for field in table.schema:
        if pa.types.is_string(field.type):
            gone = pc.or_(gone, is_named(table[field.name], subjects))
    kept = table.filter(pc.invert(gone))
    removed = len(table) - len(kept)
    if name not in LISTS:
        return kept, removed
    shorten: Callable[..., dict[str, Any] | None] = shorter_list if name == "neighbours" else smaller_tile
    rows = kept.to_pylist()
    shorter = [shorten(row, subjects) for row in rows]
    changed = sum(before != after for before, after in zip(rows, shorter, strict=True))
    if changed:
        kept = pa.Table.from_pylist([row for row in shorter if row is not None], schema=table.schema)
    return kept, removed + changed


def shorter_list(row: dict[str, Any], subjects: Collection[str]) -> dict[str, Any]:
    """Return a row of the neighbours table without the subjects."""
    places = [place for place, other in enumerate(row["neighbours"]) if not names(other, subjects)]
    return row | {column: [row[column][place] for place in places] for column in LISTS["neighbours"]}


def smaller_tile(row: dict[str, Any], subjects: Collection[str]) -> dict[str, Any] | None:
    """Return a row of the similarity table without the subjects' rows and columns; None if none is left."""
    sides = [row[column] for column in LISTS["similarity"]]
    places = [[place for place, other in enumerate(side) if not names(other, subjects)] for side in sides]
    if not all(places):
        return None
    values = np.array(row["values"], dtype=np.float16).reshape(len(sides[0]), len(sides[1]))
    left = {
        column: [side[place] for place in kept]
        for column, side, kept in zip(LISTS["similarity"], sides, places, strict=True)
    }
    return row | left | {"values": list(values[np.ix_(*places)].ravel())}
