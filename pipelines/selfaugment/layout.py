"""Kept pictures as photos of layout `generated`: a root for training and one for held-out people."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines import tables
from pipelines.sources.base import CAPTIONS
from pipelines.sources.generated import COLUMNS, IMAGES, LISTING
from runtime.files import write_text

FOLDER = "generated"
SPLITS = ("train", "test")
AT_ONCE = 16
"""Pictures read at a time."""


def publish(scratch: Path, out: Path, split_of: Mapping[str, str]) -> None:
    """Write the pictures in `scratch` as files below `out`/generated, and `out`/pictures without their bytes.

    Both replace what was there only once they are complete.

    Args:
        split_of: by person.
    """
    folder, temporary = out / FOLDER, out / f".{FOLDER}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for row in drawn(scratch):
        split = split_of[row["person"]]
        path = f"{IMAGES}/{row['frame_id']}.png"
        file = temporary / split / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["image"])
        rows[split].append(row | {"image": None, "path": path})
    for split, of_split in rows.items():
        place = temporary / split
        write_listing(place / LISTING, COLUMNS, [(r["path"], r["class_name"], split, r["role"]) for r in of_split])
        write_listing(place / CAPTIONS, ("path", "caption"), [(r["path"], r["caption"]) for r in of_split])
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    whole = [row | {"path": f"{split}/{row['path']}"} for split, of_split in rows.items() for row in of_split]
    tables.write(out, "pictures", tables.from_rows("pictures", whole))


def drawn(scratch: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of the pictures table, in order."""
    for batch in tables.batches(scratch, "pictures", list(tables.spec("pictures").columns), AT_ONCE):
        yield from batch.to_pylist()


def write_listing(file: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Write a CSV file with a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(file, text.getvalue())
