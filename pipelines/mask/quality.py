"""Mask quality: one rule that cleans pieces and holes, and a quality flag from measured properties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from model.images.segment import mask_box
from runtime.params import Section

Box = Sequence[float]
"""x0, y0, x1, y1 in pixels."""

EIGHT = np.ones((3, 3), dtype=bool)
"""Pieces are 8-connected: pixels that touch at a corner belong together. Background, the complement, is 4-connected."""


class QualityParams(Section):
    """When a mask is flagged, and how it is cleaned; params.yaml gives the reason for each value."""

    min_area: float  # fraction of the photo
    max_area: float
    max_border_contact: float  # fraction of the outline on the photo's border
    min_score: float  # product of detection score and predicted IoU
    min_box_iou: float  # of the mask's box and the annotated (else the detected) one
    max_other: float  # score of the best box elsewhere over that of the subject's
    min_piece: float  # pieces smaller than this fraction of the largest are dropped
    max_hole: float  # holes smaller than this fraction of the mask are filled


def clean(mask: np.ndarray, params: QualityParams) -> np.ndarray:
    """Return `mask` [H, W] without specks and pinholes.

    First, pieces (8-connected) smaller than `min_piece` of the largest are dropped; then, holes (4-connected background
    that does not reach the photo's border) smaller than `max_hole` of the remaining mask are filled. Sizes are relative
    to the subject, so that the rule means the same for every photo size.
    """
    if not mask.any():
        return mask
    left, upper, right, lower = mask_box(mask)
    inside = np.s_[upper:lower, left:right]  # pieces and holes are inside the box, which is usually far smaller
    result = np.zeros_like(mask)
    result[inside] = _without_pinholes(_without_specks(mask[inside], params.min_piece), params.max_hole)
    return result


def _without_specks(mask: np.ndarray, smallest: float) -> np.ndarray:
    pieces, _ = ndimage.label(mask, structure=EIGHT)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return (sizes >= max(smallest * sizes.max(), 1))[pieces]


def _without_pinholes(mask: np.ndarray, largest: float) -> np.ndarray:
    grounds, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))
    sizes = np.bincount(grounds.ravel())
    filled = sizes < largest * mask.sum()
    filled[[0, grounds[0, 0]]] = False  # the mask itself, and the background around it
    return mask | filled[grounds[1:-1, 1:-1]]


def border_contact(mask: np.ndarray) -> float:
    """Return the fraction of the mask's outline that lies on the photo's border: high if the subject is cut off."""
    if not mask.any():
        return 0.0
    left, upper, right, lower = mask_box(mask)
    inside = mask[upper:lower, left:right]
    outline = inside & ~ndimage.binary_erosion(inside)
    edge = np.zeros_like(outline)
    edge[0] |= upper == 0
    edge[-1] |= lower == mask.shape[0]
    edge[:, 0] |= left == 0
    edge[:, -1] |= right == mask.shape[1]
    return float((outline & edge).sum() / outline.sum())


def quality_flag(
    area: float, contact: float, score: float, agreement: float, other: float, params: QualityParams
) -> str:
    """Return `ok`, or the first rule that the mask breaks: small, large, border, off_box, several, low_score.

    `area`: fraction of the photo; `contact`: fraction of the outline on the border; `score`: of the models;
    `agreement`: of the boxes; `other`: best score elsewhere over the subject's. Each is 0..1.
    """
    if area < params.min_area:
        return "small"
    if area > params.max_area:
        return "large"
    if contact > params.max_border_contact:
        return "border"
    if agreement < params.min_box_iou:
        return "off_box"
    if other > params.max_other:
        return "several"
    if score < params.min_score:
        return "low_score"
    return "ok"


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two masks [H, W]; 0 if both are empty."""
    return float((a & b).sum() / max((a | b).sum(), 1))


def box_iou(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes."""
    across = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    down = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    both = across * down
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / max(sum(areas) - both, 1e-9)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how well two methods agree over rows of the agreement table, for the metrics and the report.

    `mean_iou` and `median_iou` are over the photos for which both methods gave a mask, None if there are none. The
    others are only counted: a subject that is not found says something about the detector, not about its masks.
    """
    both = [row["iou"] for row in rows if row["iou"] is not None]
    return {
        "photos": len(rows),
        "both": len(both),
        "mean_iou": round(float(np.mean(both)), 4) if both else None,
        "median_iou": round(float(np.median(both)), 4) if both else None,
    }
