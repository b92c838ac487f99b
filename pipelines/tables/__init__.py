"""The Parquet tables: their schema with the meaning of each column, and validated reading and writing.

Other packages access the results of the data stages only through this one: `from pipelines import tables`,
`tables.read(...)`.
"""

from pipelines.tables.codecs import changes, count_by, decode_mask, encode_mask, halves, stack_halves
from pipelines.tables.files import (
    TableError,
    batches,
    check,
    count,
    from_rows,
    no_nulls,
    parts,
    path_order,
    read,
    read_part,
    replacing,
    rows,
    sort,
    stream,
    write,
    write_part,
    write_parts,
)
from pipelines.tables.rejects import REJECT_REASONS, move_to_rejects, reject
from pipelines.tables.schema import TABLES, Column, TableSpec, spec

__all__ = [
    "REJECT_REASONS",
    "TABLES",
    "Column",
    "TableError",
    "TableSpec",
    "batches",
    "changes",
    "check",
    "count",
    "count_by",
    "decode_mask",
    "encode_mask",
    "from_rows",
    "halves",
    "move_to_rejects",
    "no_nulls",
    "parts",
    "path_order",
    "read",
    "read_part",
    "reject",
    "replacing",
    "rows",
    "sort",
    "spec",
    "stack_halves",
    "stream",
    "write",
    "write_part",
    "write_parts",
]
