"""What a mask must be: pieces and holes cleaned by one rule, and a quality flag by measured properties."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from params import Section


class QualityParams(Section):
    """When a mask is flagged, and how it is cleaned; reasons stand beside the values in params.yaml."""

    min_area: float  # fraction of the photo
    max_area: float
    max_border_contact: float  # fraction of the outline on the photo's border
    min_score: float  # product of detection score and predicted IoU
    min_piece: float  # pieces smaller than this fraction of the largest are dropped
    max_hole: float  # holes smaller than this fraction of the mask are filled


def clean(mask: np.ndarray, params: QualityParams) -> np.ndarray:
    """Return `mask` [H, W] without specks and pinholes: small pieces dropped, small holes filled."""
    pieces, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count == 0:
        return mask
    sizes = np.bincount(pieces.ravel())[1:]
    kept = np.flatnonzero(sizes >= params.min_piece * sizes.max()) + 1
    result = np.isin(pieces, kept)
    holes, count = ndimage.label(ndimage.binary_fill_holes(result) & ~result)
    sizes = np.bincount(holes.ravel())[1:]
    small = np.flatnonzero(sizes < params.max_hole * result.sum()) + 1
    return result | np.isin(holes, small)


def border_contact(mask: np.ndarray) -> float:
    """Return the fraction of the mask's outline that lies on the photo's border: high where the subject is cut."""
    outline = mask & ~ndimage.binary_erosion(mask)
    inner = outline.copy()
    inner[1:-1, 1:-1] = False
    return float(inner.sum() / max(outline.sum(), 1))


def quality(area: float, contact: float, score: float, params: QualityParams) -> str:
    """Return `ok`, or the first rule that the mask breaks: small, large, border, low_score."""
    if area < params.min_area:
        return "small"
    if area > params.max_area:
        return "large"
    if contact > params.max_border_contact:
        return "border"
    if score < params.min_score:
        return "low_score"
    return "ok"
