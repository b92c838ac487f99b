"""Boxes of masks, as numpy arrays [B, 4] of x0 y0 x1 y1 in pixels, the last two exclusive."""

import numpy as np
from numpy.typing import NDArray


def boxes_of(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Tight boxes of masks [B, H, W]; an empty mask gives zeros."""
    found = []
    for axis in (1, 2):
        line: NDArray[np.bool_] = np.asarray(masks.any(axis))
        first, last = line.argmax(1), line.shape[1] - line[:, ::-1].argmax(1)
        found.append((np.where(line.any(1), first, 0), np.where(line.any(1), last, 0)))
    (x0, x1), (y0, y1) = found
    return np.stack([x0, y0, x1, y1], 1).astype(np.float32)


def jitter(boxes: NDArray[np.float32], share: float, side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Move each corner by Gaussian noise, sigma `share` of the box's side, within an image of `side` pixels."""
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    moved = boxes + rng.normal(0, share, boxes.shape) * sides
    return moved.clip(0, side).astype(np.float32)


def iou(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Intersection over union of each pair of boxes, [B]."""
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    inner = (high - low).clip(0).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).clip(0).prod(1) for box in (a, b)]
    return (inner / np.maximum(areas[0] + areas[1] - inner, 1e-6)).astype(np.float32)
