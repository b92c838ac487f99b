"""Column encodings (masks as run lengths, vectors as lists of fp16) and helpers on columns."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pycocotools import mask as coco_mask


def encode_mask(mask: np.ndarray) -> bytes:
    """Return a bool mask [H, W] as COCO compressed run lengths."""
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]


def decode_mask(counts: bytes, height: int, width: int) -> np.ndarray:
    """Return the bool mask [H, W] of COCO compressed run lengths."""
    return coco_mask.decode({"counts": counts, "size": [height, width]}).astype(bool)


def halves(values: np.ndarray) -> pa.Array:
    """Return a 2-D array [rows, n] as Arrow lists of fp16."""
    flat = np.ascontiguousarray(values, dtype=np.float16)
    offsets = np.arange(0, flat.size + 1, flat.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat.reshape(-1)))


def stack_halves(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of equally long fp16 lists as an array [rows, n]."""
    if not len(column):
        return np.empty((0, 0), dtype=np.float16)
    combined = column.combine_chunks()
    return combined.flatten().to_numpy(zero_copy_only=False).reshape(len(combined), -1)


def changes(column: pa.ChunkedArray) -> np.ndarray:
    """Return where a value differs from the previous one [rows], bool; True at the first."""
    return np.append(True, pc.not_equal(column[1:], column[:-1]).to_numpy())


def count_by(values: Iterable[str]) -> dict[str, int]:
    """Return how often each value occurs, most frequent first, ties by name."""
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
