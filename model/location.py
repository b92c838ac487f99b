"""Location of the subject during sampling: one soft map from a step's attention maps (method, section 4)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import AttentionMaps

THRESHOLD = 0.2
"""Values of the normalised map below this are background."""


def location_map(maps: Iterable[AttentionMaps], size: tuple[int, int]) -> Tensor | None:
    """The maps of one UNet call -> [B, S, h, w] in 0..1 at `size` (the latent's); None if nothing was recorded.

    For each layer the text map and the visual map: mean over heads, min-max, upsampled; then the mean over all of them,
    min-max, zero below 0.2, min-max. Soft, not binary. The visual map is the mean of its tokens' maps after min-max
    of each: before it, the tokens sum to 1 at every pixel [a reading].
    """
    upsampled = []
    for layer in maps:
        if layer.text is not None:
            upsampled.append(upsample(min_max(layer.text.mean(dim=2)), size))
        if layer.visual is not None:
            tokens = min_max(layer.visual.mean(dim=2))
            upsampled.append(upsample(min_max(tokens.mean(dim=2)), size))
    if not upsampled:
        return None
    mean = min_max(torch.stack(upsampled).mean(dim=0))
    return min_max(torch.where(mean < THRESHOLD, 0.0, mean))


def min_max(maps: Tensor) -> Tensor:
    """Each map [..., h, w] rescaled to 0..1. A flat one carries no location and becomes 1 everywhere."""
    low = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - low
    flat = span < 1e-6
    return torch.where(flat, 1.0, (maps - low) / torch.where(flat, 1.0, span))


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, S, h, w] -> [B, S, *size], bilinear."""
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)
