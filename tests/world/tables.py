"""Complete rows of the tables, with defaults for the columns that a test does not set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import tables

MASK = np.zeros((72, 96), dtype=bool)
MASK[12:60, 20:50] = True
"""Default pixels of `mask`."""


def frame(frame_id: str, **columns: Any) -> dict[str, Any]:
    """A row of the frames table: a training photo of a mug without a pose, of the subject that the id begins with."""
    row = dict.fromkeys(tables.spec("frames").columns)
    row |= {"frame_id": frame_id, "subject_id": frame_id.rpartition("/")[0], "source": "s", "class_name": "mug"}
    row |= {"caption": "a mug", "caption_origin": "template", "noun_start": 2, "noun_end": 5, "split": "train"}
    row |= {"path": frame_id, "width": 96, "height": 72, "sha256": "", "phash": bytes(32), "sharpness": 1.0}
    return row | columns


def mask(frame_id: str, pixels: np.ndarray = MASK, **columns: Any) -> dict[str, Any]:
    """A row of the masks table: an annotated mask with quality ok."""
    height, width = pixels.shape
    row = {"frame_id": frame_id, "phrase": "mug", "method": "annotated", "box": [0.0, 0.0, 1.0, 1.0], "score": 1.0}
    row |= {"height": height, "width": width, "rle": tables.encode_mask(pixels), "mask_score": 1.0}
    return row | {"area": float(pixels.mean()), "border_contact": 0.0, "quality": "ok"} | columns


def triplet(triplet_id: str, reference: str, positive: str, target: str, **columns: Any) -> dict[str, Any]:
    """A row of the triplets table, selected by frame order."""
    row: dict[str, Any] = {"triplet_id": triplet_id, "subject_id": triplet_id.rpartition("/")[0], "class_name": "mug"}
    row |= {"reference": reference, "positive": positive, "target": target, "method": "order"}
    return row | {"reference_target_angle": None, "reference_positive_angle": None} | columns


def embedding(frame_id: str, vector: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """A row of the embeddings table."""
    return {"frame_id": frame_id, "subject_id": frame_id.rpartition("/")[0], "encoder": "e", "vector": vector}


def write(folder: Path, name: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as a table with one part."""
    tables.write(folder, name, tables.from_rows(name, list(rows)))
