"""Segments: photos read together with their masks, for the stages after mask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipelines import tables
from pipelines.photos.decode import DecodeError, decode_image
from pipelines.photos.roots import Roots
from runtime.errors import UserError

FRAME_COLUMNS = ("source", "path")


def usable(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (frame_id, row) of the masks whose quality is ok, in the table's order, streaming the table."""
    columns = ["frame_id", "height", "width", "rle", "quality"]
    return ((row["frame_id"], row) for row in tables.rows(folder, "masks", columns) if row["quality"] == "ok")


def usable_ids(folder: Path) -> pa.ChunkedArray:
    """Return the frame_ids that `usable` yields."""
    table = tables.read(folder, "masks", ["frame_id", "quality"])
    return table.filter(pc.equal(table["quality"], "ok"))["frame_id"]


def read_segment(roots: Roots, frame: dict[str, Any]) -> tuple[Image.Image, np.ndarray]:
    """Return the photo [RGB] and the mask (bool [H, W]) of a frame row with its mask row under `extra`.

    Raises:
        UserError: the photo was removed or damaged after the mask stage read it.
    """
    try:
        image = decode_image(roots[frame["source"]].read(frame["path"]))
    except (DecodeError, FileNotFoundError) as error:
        name = roots[frame["source"]].name(frame["path"])
        raise UserError(f"{name} can no longer be read ({error}); run curate and mask again") from None
    mask = frame["extra"]
    return image, tables.decode_mask(mask["rle"], mask["height"], mask["width"])
