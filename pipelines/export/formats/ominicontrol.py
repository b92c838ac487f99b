"""OminiControl: Parquet with the columns of Subjects200K, in which a pair is one image, its views side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from pipelines.export import render
from pipelines.export.formats.base import EncodedPair, Format, refuse_masks
from pipelines.export.formats.parquet import IMAGE, file_of, write_rows
from pipelines.export.options import ExportOptions
from pipelines.export.plan import Part
from pipelines.export.records import schema
from pipelines.export.render import PairImage
from runtime.errors import UserError

PADDING = 8
"""px around and between the views, as `train.dataset.padding` in OminiControl's train/config/subject.yaml."""
RATINGS = ("compositeStructure", "objectConsistency", "imageQuality")
HIGHEST = 5
"""Of a rating. Its training drops pairs below it; those exported have passed the filters of the pipeline."""
TEXT = pa.string()
COLUMNS: dict[str, pa.DataType] = {
    "image": IMAGE,
    "collection": TEXT,
    "quality_assessment": pa.struct([(name, pa.int64()) for name in RATINGS]),
    "description": pa.struct(
        [
            ("item", TEXT),
            ("description_0", TEXT),
            ("description_1", TEXT),
            ("category", TEXT),
            ("description_valid", pa.bool_()),
        ]
    ),
}


class OminiControl(Format):
    """`data/train-000000.parquet`; left in its images is the target, right the reference, each with its caption."""

    name = "ominicontrol"
    summary = "Parquet files like Subjects200K, the views of a pair side by side"
    note = f"Boxes are px of a view; the views are {PADDING} px from the image's border and from each other."

    def check(self, options: ExportOptions) -> None:
        refuse_masks("OminiControl", options)
        if options.reference != "whole":
            raise UserError("OminiControl trains on either view of a pair as the target; give --reference whole")
        if options.crop != "square":
            raise UserError("OminiControl cuts its images into squares of one size; give --crop square")
        if options.views != 1:
            raise UserError("OminiControl has two views in a pair; give --views 1")

    def encode(self, images: Mapping[str, PairImage], options: ExportOptions) -> dict[str, tuple[str, bytes]]:
        side = options.size
        page = Image.new("RGB", (2 * side + 3 * PADDING, side + 2 * PADDING), "white")
        page.paste(images["target"].image, (PADDING, PADDING))
        page.paste(images["reference"].image, (side + 2 * PADDING, PADDING))
        return {"pair": render.encoded(page, options)}

    def write(self, part: Part, pairs: Iterable[EncodedPair], folder: Path, options: ExportOptions) -> Iterator[str]:
        columns = pa.schema([*COLUMNS.items(), *((field.name, field.type) for field in schema(options))])
        return write_rows(folder / self.holder(part.split, part.index, 0, options), columns, pairs, self.row)

    def row(self, pair: EncodedPair) -> dict[str, Any]:
        """Return the values of a pair."""
        noun = pair.record["class"]
        return {
            "image": file_of(pair, "pair"),
            "collection": pair.record["subject"].split("/")[0],
            "quality_assessment": dict.fromkeys(RATINGS, HIGHEST),
            "description": {
                "item": noun,
                "description_0": pair.captions["target"],
                "description_1": pair.captions["reference"],
                "category": noun,
                "description_valid": True,
            },
        } | pair.record

    def holder(self, split: str, index: int, number: int, options: ExportOptions) -> str:
        return f"data/{Part(split, index, ()).name}.parquet"

    def data_files(self, split: str) -> str | None:
        return f"data/{split}-*.parquet"

    def reads(self, splits: Iterable[str], options: ExportOptions) -> str:
        return (
            f'Subject200KDataset(datasets.load_dataset(".", split="train"), image_size={options.size},'
            f" padding={PADDING})    # in place of Yuanshi/Subjects200K in omini/train_flux/train_subject.py"
        )
