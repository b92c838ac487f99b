"""Parquet files as the Hugging Face datasets library writes them: images inside, column types in the schema."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.export.formats.base import EncodedPair, Format
from pipelines.export.options import ExportOptions
from pipelines.export.plan import Part
from pipelines.export.records import schema

ROW_GROUP = 100
"""Pairs that are decoded together: some 20 MB of images, which a viewer of the hub still loads at once."""
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Parquet(Format):
    """`data/train-000000.parquet` with the columns `image` (the target), `reference` and so on, and those of the
    record."""

    name = "parquet"
    summary = "Parquet files with images, as datasets of the Hugging Face hub"

    def write(self, part: Part, pairs: Iterable[EncodedPair], folder: Path, options: ExportOptions) -> Iterator[str]:
        roles = [*options.roles(), *(f"{role}_mask" for role in options.roles() if "mask" in options.fields)]
        columns = pa.schema([(column(role), IMAGE) for role in roles] + [(f.name, f.type) for f in schema(options)])

        def row(pair: EncodedPair) -> dict[str, Any]:
            return {column(role): file_of(pair, role) for role in roles} | pair.record

        return write_rows(folder / self.holder(part.split, part.index, 0, options), columns, pairs, row)

    def holder(self, split: str, index: int, number: int, options: ExportOptions) -> str:
        return f"data/{Part(split, index, ()).name}.parquet"

    def data_files(self, split: str) -> str | None:
        return f"data/{split}-*.parquet"

    def reads(self, splits: Iterable[str], options: ExportOptions) -> str:
        return 'datasets.load_dataset(".", split="train")'


def column(role: str) -> str:
    """Return the column of an image: `image` for the target, which readers expect by that name."""
    return "image" if role == "target" else role


def file_of(pair: EncodedPair, role: str) -> dict[str, Any]:
    """Return an image of a pair as the value of an image column."""
    suffix, data = pair.files[role]
    return {"bytes": data, "path": f"{pair.key}.{role}{suffix}"}


def write_rows(file: Path, columns: pa.Schema, pairs: Iterable[EncodedPair], row: Any) -> Iterator[str]:
    """Write a Parquet file, holding one row group; yield an empty line of the index for each pair.

    Args:
        columns: structs of IMAGE are images.
        row: returns the values of a pair.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    features = {field.name: feature(field.type) for field in columns}
    typed = columns.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    with pq.ParquetWriter(file, typed, compression="snappy", write_page_index=True) as writer:
        waiting = iter(pairs)
        while group := list(islice(waiting, ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist([row(pair) for pair in group], schema=typed))
            yield from ("" for _ in group)


def feature(kind: pa.DataType) -> Mapping[str, Any]:
    """Return a column type as the datasets library names it."""
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_struct(kind):
        return {field.name: feature(field.type) for field in kind}
    if pa.types.is_list(kind):
        return {"feature": feature(kind.value_type), "_type": "Sequence"}
    return {"dtype": {pa.float32(): "float32"}.get(kind, str(kind)), "_type": "Value"}
