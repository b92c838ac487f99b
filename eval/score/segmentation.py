"""Segmenting the subject of an image by its class noun, for the similarity scores (method, section 5).

Each generated image is segmented once; every metric reads the segmentations table.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image
from scipy import ndimage

from eval.tasks.resume import Task
from model.backbones.grounded_sam import Cut, Detection
from pipelines import tables
from pipelines.photos.prefetch import prefetch

Row = dict[str, Any]
PLACE = ("method", "subject_id", "group", "prompt_id", "index")
"""Key of a generated image."""


class GroundedSegmenter(Protocol):
    """The interface used of `model.backbones.grounded_sam.GroundedSam`."""

    def prepare(self, image: Image.Image) -> Any: ...

    def cut_out(
        self, photos: Iterable[tuple[int, Any, str]], min_score: float
    ) -> Iterator[tuple[int, Detection | None, Cut | None]]: ...


@dataclass(frozen=True)
class SubjectFinder:
    """Computes the rows of the segmentations table from rows of the generations table."""

    model: GroundedSegmenter
    phrase: str
    """Text query of the detector; {class} is the class noun."""
    min_detection: float
    """Detections below this score, 0..1, are misses."""
    min_piece: float
    """See `without_specks`."""
    decoders: int
    """Threads that read ahead while the models compute."""
    ahead: int
    """Images that they may be ahead."""

    def __call__(self, generations: Sequence[Row]) -> list[Row]:
        ready = prefetch(self.prepare, enumerate(generations), self.decoders, self.ahead)
        found = list(self.model.cut_out(ready, self.min_detection))
        return [self.row(generations[number], detection, cut) for number, detection, cut in sorted(found, key=_number)]

    def prepare(self, numbered: tuple[int, Row]) -> tuple[int, Any, str]:
        """Return a numbered image preprocessed for the models, with its text query; runs in threads."""
        number, row = numbered
        return number, self.model.prepare(picture(row)), self.phrase.replace("{class}", row["class_name"])

    def row(self, generation: Row, detection: Detection | None, cut: Cut | None) -> Row:
        """Return a row of the segmentations table."""
        width, height = Image.open(io.BytesIO(generation["image"])).size
        mask = without_specks(cut.mask, self.min_piece) if cut is not None and cut.mask.any() else None
        return {
            **{key: generation[key] for key in PLACE},
            "segmented": mask is not None,
            "score": None if detection is None else detection.score,
            "box": None if detection is None else list(detection.box),
            "rle": None if mask is None else tables.encode_mask(mask),
            "height": height,
            "width": width,
        }


def tasks(subjects: Iterable[tuple[Sequence[Row], Sequence[str]]]) -> Iterator[Task]:
    """Yield the task of each method's images of a subject: rows of the generations table, hashes of their images."""
    for rows, images in subjects:
        first = rows[0]
        inputs = [[[row[key] for key in PLACE] for row in rows], first["class_name"], images]
        yield Task(f"{first['method']}/{first['subject_id']}", inputs, len(rows), rows)


def picture(generation: Mapping[str, Any]) -> Image.Image:
    """Return the image of a row of the generations table, RGB."""
    return Image.open(io.BytesIO(generation["image"])).convert("RGB")


def digests(generations: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the SHA-256 of each image's file."""
    return [hashlib.sha256(row["image"]).hexdigest() for row in generations]


def mask_of(segmentation: Mapping[str, Any]) -> np.ndarray | None:
    """Return the mask (bool [H, W]) of a row of the segmentations table, None for a miss."""
    if not segmentation["segmented"]:
        return None
    return tables.decode_mask(segmentation["rle"], segmentation["height"], segmentation["width"])


def without_specks(mask: np.ndarray, min_piece: float) -> np.ndarray:
    """Return `mask` [H, W] without components below this fraction of the largest: a speck would widen the crop."""
    pieces, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(pieces.ravel())[1:]
    return np.isin(pieces, np.flatnonzero(sizes >= min_piece * sizes.max()) + 1)


def _number(found: tuple[int, Any, Any]) -> int:
    return found[0]
