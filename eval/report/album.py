"""Images for a page: photos and their masks as small data URIs."""

from __future__ import annotations

import base64
import heapq
import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from eval.protocol.protocol import HeldOutPhoto, read_photo
from model.images.overlay import OUTLINE, outlined
from model.images.segment import on_white
from pipelines import tables
from pipelines.photos.roots import Roots
from runtime.errors import UserError

SECOND = (0, 120, 255)
"""Distinct from the pink for red-green colour-blind readers too."""


@dataclass(frozen=True)
class InlineImage:
    """An image in a page: its data URI, and whether it is scaled up without smoothing."""

    src: str
    pixelated: bool


def inline(image: Image.Image, side: int) -> InlineImage:
    """Return `image` as a data URI: unchanged (PNG) up to `side` px, else scaled down to it (JPEG)."""
    stream = io.BytesIO()
    if max(image.size) <= side:
        image.save(stream, "PNG", optimize=True)
        return InlineImage(_uri("png", stream), True)
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(stream, "JPEG", quality=85)
    return InlineImage(_uri("jpeg", stream), False)


def boxed(image: Image.Image, box: Sequence[float], side: int) -> Image.Image:
    """Return `image` scaled down to `side` px with a box (x0, y0, x1, y1, fractions of the sides)."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    x0, y0, x1, y1 = (f * length for f, length in zip(box, (*small.size, *small.size), strict=True))
    corners = (min(x0, x1), min(y0, y1), max(x0, x1) - 1, max(y0, y1) - 1)
    if corners[0] <= corners[2] and corners[1] <= corners[3]:
        ImageDraw.Draw(small).rectangle(corners, outline=OUTLINE, width=2)
    return small


class Album:
    """Finds photos and their masks by frame_id and reads them; None for those that cannot be read."""

    def __init__(self, data: Path, roots: Roots, side: int) -> None:
        self.data, self.roots, self.side = data, roots, side

    def photos(self, frame_ids: Iterable[str]) -> dict[str, HeldOutPhoto]:
        """Return the photos with those ids, with the rows of their masks if the mask stage has run."""
        wanted = set(frame_ids)
        masks = {}
        if present(self.data / "mask", "masks"):
            columns = ["frame_id", "height", "width", "rle", "quality"]
            masks = _rows_with(self.data / "mask", "masks", columns, wanted)
        columns = ["frame_id", "source", "path", "sha256"]
        frames = _rows_with(self.data / "curate", "frames", columns, wanted)
        return {
            frame_id: HeldOutPhoto(frame_id, row["source"], row["path"], row["sha256"], masks.get(frame_id))
            for frame_id, row in frames.items()
        }

    def read(self, photo: HeldOutPhoto | None) -> tuple[Image.Image, np.ndarray | None] | None:
        """Return photo and mask; None if the photo is missing or differs in size from its mask."""
        if photo is None:
            return None
        try:
            image, mask = read_photo(self.roots, photo)
        except UserError:
            return None
        return None if mask is not None and mask.shape != image.size[::-1] else (image, mask)

    def whole(self, photo: HeldOutPhoto | None) -> InlineImage | None:
        """Return the whole photo."""
        found = self.read(photo)
        return inline(found[0], self.side) if found else None

    def segment(self, photo: HeldOutPhoto | None) -> InlineImage | None:
        """Return the subject on white."""
        found = self.read(photo)
        if found is None or found[1] is None or not found[1].any():
            return None
        return inline(on_white(found[0], found[1], margin=0.05), self.side)

    def overlay(self, photo: HeldOutPhoto | None) -> InlineImage | None:
        """Return the photo with its mask's outline."""
        found = self.read(photo)
        if found is None or found[1] is None:
            return None
        return inline(outlined(found[0], found[1], self.side), self.side)

    def compared(self, photo: HeldOutPhoto | None, row: dict[str, Any]) -> InlineImage | None:
        """Return the photo with both outlines of a row of the agreement table, the annotated mask on top."""
        read = self.read(photo)
        if read is None:
            return None
        drawn = read[0]
        for name, colour in (("found", SECOND), ("annotated", OUTLINE)):
            if row[name] is not None:
                mask = tables.decode_mask(row[name], row["height"], row["width"])
                drawn = outlined(drawn, mask, self.side, colour)
        return inline(drawn, self.side)

    def rejected(self, row: dict[str, Any], photos: Mapping[str, HeldOutPhoto]) -> InlineImage | None:
        """Return the photo of a row of the rejects table with its annotated box; None if it cannot be shown.

        Args:
            photos: those with a row in the frames table, for rejects of later stages.
        """
        photo = photos.get(row["id"])
        if row["source"] is not None and row["path"] is not None:
            photo = HeldOutPhoto(row["id"], row["source"], row["path"], "", None)
        found = self.read(photo)
        if found is None:
            return None
        image = found[0] if row["box"] is None else boxed(found[0], row["box"], self.side)
        return inline(image, self.side)


def present(folder: Path, name: str) -> bool:
    """Whether the stage that writes a table has run."""
    return any((folder / name).glob("part-*.parquet"))


def sample(rows: Iterable[dict[str, Any]], key: str, count: int) -> list[dict[str, Any]]:
    """Return `count` rows chosen by the hash of their id, in table order: few of them change as data grow."""
    ranked = ((zlib.crc32(row[key].encode()), number, row) for number, row in enumerate(rows))
    chosen = heapq.nsmallest(count, ranked, key=lambda entry: entry[:2])
    return [row for _, _, row in sorted(chosen, key=lambda entry: entry[1])]


def _rows_with(folder: Path, name: str, columns: Sequence[str], wanted: set[str]) -> dict[str, dict[str, Any]]:
    return {row["frame_id"]: row for row in tables.rows(folder, name, columns) if row["frame_id"] in wanted}


def _uri(kind: str, stream: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
