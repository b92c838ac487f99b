"""What is found in a photo: a box with its score, and the mask of its content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.backbones.segmenters.segmenter import Box


@dataclass(frozen=True)
class Detection:
    """The best box of a phrase in a photo."""

    box: Box
    score: float
    """Probability, 0..1, that the phrase belongs to the box; of a Grounding DINO the highest of its words."""
    other: float = 0.0
    """The same for the best box elsewhere: one that shares less than half of the smaller box's area with this one."""


@dataclass(frozen=True)
class Cut:
    """The segmented content of a box."""

    mask: np.ndarray
    """bool [H, W], of the photo's size."""
    score: float
    """Predicted IoU, 0..1."""


def best_boxes(scores: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row's scores [B, Q] and corner boxes [B, Q, 4]: the best score [B], its query [B], its box [B, 4], and
    the best score elsewhere [B]."""
    best, query = scores.max(-1)
    chosen = boxes[torch.arange(len(query), device=query.device), query]
    other = scores.masked_fill(~elsewhere(boxes, chosen[:, None]), 0).amax(-1)
    return best, query, chosen, other


def elsewhere(boxes: Tensor, chosen: Tensor) -> Tensor:
    """Whether corner boxes [..., 4] share less than half of the smaller area with the chosen ones; bool [...].

    A part of the subject, and a group that contains it, share all of it.
    """
    upper, lower = torch.maximum(boxes[..., :2], chosen[..., :2]), torch.minimum(boxes[..., 2:], chosen[..., 2:])
    shared = (lower - upper).clamp(min=0).prod(-1)
    areas = [(some[..., 2:] - some[..., :2]).clamp(min=0).prod(-1) for some in (boxes, chosen)]
    return shared < torch.minimum(*areas) / 2


def within(size: tuple[int, int], box: Sequence[float], score: float, other: float) -> Detection | None:
    """`box` (corners relative to the photo) in pixels, clipped to `size` (height, width); None if nothing is left."""
    x0, x1 = (min(max(x, 0.0), 1.0) * size[1] for x in (box[0], box[2]))
    y0, y1 = (min(max(y, 0.0), 1.0) * size[0] for y in (box[1], box[3]))
    return Detection((x0, y0, x1, y1), score, other) if x1 > x0 and y1 > y0 else None
