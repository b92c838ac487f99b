"""ImageFolder of the datasets library: image files and a metadata.jsonl in each split's folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.export.formats.base import EncodedPair, Format, line, write_file
from pipelines.export.options import ExportOptions
from pipelines.export.plan import Part
from pipelines.export.records import schema

INDEX = "metadata.jsonl"
UNKNOWN: dict[pa.DataType, Any] = {pa.float32(): -1.0, pa.string(): "", pa.list_(pa.int32()): []}
"""What stands for null: the reader infers a column's type from the first rows, and refuses splits that differ in it."""


class ImageFolder(Format):
    """`train/metadata.jsonl` and `train/000000/00000000.target.jpg`; its columns are `image` (the target), `reference`
    and so on, and `text`, as the training examples of diffusers read them."""

    name = "imagefolder"
    summary = "image files with a metadata.jsonl, as the examples of diffusers read them"
    note = "An unknown number is -1, an unknown text empty: JSON Lines have no column types."

    def write(self, part: Part, pairs: Iterable[EncodedPair], folder: Path, options: ExportOptions) -> Iterator[str]:
        fields = {field.name: field.type for field in schema(options)}
        for pair in pairs:
            names: dict[str, Any] = {}
            for role, (suffix, data) in pair.files.items():
                name = f"{part.index:06d}/{pair.key}.{role}{suffix}"
                names["file_name" if role == "target" else f"{role}_file_name"] = name
                write_file(folder / part.split / name, data)
            yield line(names | {key: UNKNOWN[fields[key]] if v is None else v for key, v in pair.record.items()})

    def holder(self, split: str, index: int, number: int, options: ExportOptions) -> str:
        return f"{split}/{index:06d}/{number:08d}.target{options.suffix}"

    def index(
        self, split: str, entries: Iterator[str], options: ExportOptions
    ) -> Iterator[tuple[str, Iterable[bytes]]]:
        yield f"{split}/{INDEX}", (f"{entry}\n".encode() for entry in entries)

    def data_files(self, split: str) -> str | None:
        return f"{split}/**"

    def reads(self, splits: Iterable[str], options: ExportOptions) -> str:
        return 'datasets.load_dataset("imagefolder", data_dir="train", split="train")'
