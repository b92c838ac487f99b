"""The annotation files of Open Images, stored so that the 14.6 million boxes of its train split fit in memory."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from pipelines.photos.licences import attribution, normalised
from pipelines.photos.listings import csv_rows
from pipelines.photos.roots import Root
from pipelines.sources.base import ATTRIBUTES

_CORNERS = ("XMin", "YMin", "XMax", "YMax")
# In the order of base.ATTRIBUTES; third-party subsets of the files may lack them.
_ATTRIBUTE_COLUMNS = ("IsOccluded?", "IsTruncated?", "IsGroupOf?", "IsDepiction?", "IsInside?")
_BOX_COLUMNS = ("ImageID", "LabelName", *_CORNERS, *_ATTRIBUTE_COLUMNS)
_MASK_COLUMNS = ("ImageID", "LabelName", *(f"Box{corner}" for corner in _CORNERS), "BoxID", "MaskPath")
_IMAGE_COLUMNS = ("ImageID", "License?", "Author?", "OriginalLandingURL?", "OriginalURL?")

# The box file and the mask file round the same box differently.
_SAME_BOX = 1e-3

_NO_MASK = ("", "")


@dataclass(frozen=True)
class Box:
    """One row. corners: (x0, y0, x1, y1), NaN if not a number; attributes: those present, from `ATTRIBUTES`; where:
    file and line; mask: MaskPath."""

    label: str
    corners: tuple[float, float, float, float]
    where: str
    attributes: tuple[str, ...] = ()
    box_id: str = ""
    mask: str = ""

    @property
    def valid(self) -> bool:
        """Whether the box has an area and is inside the photo."""
        x0, y0, x1, y1 = self.corners
        return 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


class BoxRows:
    """The rows of existing photos, column by column, and the ids of annotated photos that do not exist.

    photos: number of each existing ImageID. file: for messages.
    """

    def __init__(self, photos: Mapping[str, int], file: str) -> None:
        self.missing: set[str] = set()
        self._photos = photos
        self._file = file
        self._photo = array("q")
        self._line = array("q")
        self._corners = array("d")
        self._attributes = array("b")
        self._labels: list[str] = []
        self._masks: list[tuple[str, str]] = []

    def add(
        self,
        line: int,
        image_id: str,
        label: str,
        corners: Sequence[str],
        attributes: int = 0,
        mask: tuple[str, str] = _NO_MASK,
    ) -> None:
        """Add a row. attributes: bit n for the n-th of `ATTRIBUTES`; mask: (BoxID, MaskPath)."""
        if image_id not in self._photos:
            self.missing.add(image_id)
            return
        self._photo.append(self._photos[image_id])
        self._line.append(line)
        self._corners.extend(map(_number, corners))
        self._attributes.append(attributes)
        self._labels.append(sys.intern(label))
        self._masks.append(mask)

    def of(self, image_id: str) -> list[Box]:
        """Return the rows of an existing photo, in the order of the file; call after the last `add`."""
        order, photo = self._by_photo
        number = self._photos[image_id]
        first, end = np.searchsorted(photo, [number, number + 1])
        return [self._row(int(row)) for row in order[first:end]]

    @cached_property
    def _by_photo(self) -> tuple[np.ndarray, np.ndarray]:
        photo = np.array(self._photo, dtype=np.int64)
        order = np.argsort(photo, kind="stable")
        return order, photo[order]

    def _row(self, row: int) -> Box:
        x0, y0, x1, y1 = self._corners[4 * row : 4 * row + 4]
        attributes = tuple(name for bit, name in enumerate(ATTRIBUTES) if self._attributes[row] >> bit & 1)
        where = f"{self._file} line {self._line[row]}"
        return Box(self._labels[row], (x0, y0, x1, y1), where, attributes, *self._masks[row])


def read_boxes(root: Root, file: str, photos: Mapping[str, int]) -> BoxRows:
    """Return the rows of `*-annotations-bbox.csv`; attributes are 1 (yes), 0 (no) or -1 (unknown, taken as no).

    Raises:
        UserError: a column is missing or a row is too short.
    """
    rows = BoxRows(photos, file)
    for line, (image_id, label, *values) in csv_rows(root, file, _BOX_COLUMNS):
        attributes = sum((cell.strip() == "1") << bit for bit, cell in enumerate(values[4:]))
        rows.add(line, image_id, label, values[:4], attributes)
    return rows


def read_masks(root: Root, file: str, photos: Mapping[str, int]) -> BoxRows:
    """Return the rows of `*-annotations-object-segmentation.csv`, none if there is no such file.

    Raises:
        UserError: a column is missing or a row is too short.
    """
    rows = BoxRows(photos, file)
    if root.exists(file):
        for line, (image_id, label, *corners, box_id, mask) in csv_rows(root, file, _MASK_COLUMNS):
            rows.add(line, image_id, label, corners, mask=(box_id, mask))
    return rows


def read_credits(root: Root, file: str | None, photos: Mapping[str, int]) -> list[tuple[str | None, str | None]]:
    """Return (licence, attribution) of each existing photo, by its number, from a file of images; None where it says
    nothing, or there is no such file.

    Raises:
        UserError: a row is too short.
    """
    credits: list[tuple[str | None, str | None]] = [(None, None)] * len(photos)
    if file is not None:
        for _, (image_id, licence, author, page, url) in csv_rows(root, file, _IMAGE_COLUMNS):
            if image_id in photos:
                name = normalised(licence)
                credits[photos[image_id]] = (name and sys.intern(name), attribution(author, page or url))
    return credits


def with_masks(boxes: Sequence[Box], masks: Sequence[Box]) -> dict[str, Box]:
    """Return the boxes of a photo by BoxID or, if no mask gives it, by their number in the photo; sorted.

    A mask is assigned to the nearest unassigned box of its class whose corners agree; one that fits no box adds its
    own. Rows that repeat a BoxID count once.
    """
    named: dict[str, Box] = {}
    taken: set[int] = set()
    for mask in masks:
        if mask.box_id in named:
            continue
        free = [n for n, box in enumerate(boxes) if n not in taken and box.label == mask.label]
        distance, number = min(((_distance(boxes[n], mask), n) for n in free), default=(math.inf, -1))
        if distance <= _SAME_BOX:
            taken.add(number)
            named[mask.box_id] = replace(boxes[number], box_id=mask.box_id, mask=mask.mask)
        else:
            named[mask.box_id] = mask
    unnamed = {f"{n:03d}": box for n, box in enumerate(boxes) if n not in taken}
    return dict(sorted((unnamed | named).items()))


def _distance(one: Box, other: Box) -> float:
    distances = [abs(a - b) for a, b in zip(one.corners, other.corners, strict=True)]
    return math.inf if any(map(math.isnan, distances)) else max(distances)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan
