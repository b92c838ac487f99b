"""Where a subject acts: one map from the attention of its target phrase in a pass without the subject."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import MapRecorder
from model.location import upsample
from model.methods.guidance import RealCustomGuidance
from runtime.errors import ModelError

EPSILON = 1e-6
"""Least divisor of a map."""


def recorder_of(latent_size: tuple[int, int], guidance: RealCustomGuidance) -> MapRecorder:
    """A recorder of what `subject_mask` reads: all cross-attention maps, with self-attention those of half the
    latent's size."""
    height, width = halved(latent_size)
    return MapRecorder(latent_size[0] * latent_size[1], self_pixels=height * width if guidance.self_attention else 0)


def subject_mask(
    recorder: MapRecorder, tokens: Tensor, latent_size: tuple[int, int], guidance: RealCustomGuidance
) -> Tensor:
    """Recorded maps of R rows -> masks [R, S, h, w] in 0..1 (unless `normalise: none`), at the size of the UNet's
    largest map; with self-attention at half the latent's.

    `tokens` [R, S]: tokens of each phrase, over which maps are summed. The mean over heads of each layer, upsampled,
    then the mean over layers, normalised; the largest `scope` of the cells stay, or those from `threshold` up.
    """
    layers = [layer.text for layer in recorder.maps.values() if layer.text is not None]
    maps = [layer.mean(dim=2) * tokens.to(layer)[..., None, None] for layer in layers]
    if guidance.self_attention:
        size = halved(latent_size)
        found = word_map([upsample(one, size) for one in low_resolution(maps, latent_size)], guidance)
        found = through_self_attention(found, recorder.self_maps)
    else:
        size = max(((one.shape[-2], one.shape[-1]) for one in maps), key=lambda size: size[0] * size[1])
        found = word_map([upsample(one, size) for one in maps], guidance)
    return quantity(normalised(found, guidance), guidance)


def word_map(maps: Sequence[Tensor], guidance: RealCustomGuidance) -> Tensor:
    """Mean over layers of maps of one size [R, S, h, w]."""
    if guidance.normalise == "min_max_per_layer":
        maps = [min_max(one) for one in maps]
    return torch.stack(list(maps)).mean(dim=0)


def low_resolution(maps: Sequence[Tensor], latent_size: tuple[int, int]) -> list[Tensor]:
    """The maps at a quarter of the latent's size; all of them if there are none."""
    quarter = halved(halved(latent_size))
    return [one for one in maps if (one.shape[-2], one.shape[-1]) == quarter] or list(maps)


def through_self_attention(found: Tensor, self_maps: Sequence[Tensor]) -> Tensor:
    """M_self M_cross: each cell gets the phrase's mean over the cells that it attends to.

    found [R, S, h, w], self_maps [R, N, N] of each layer, rows being queries, N = h w -> [R, S, h, w].
    """
    if not self_maps:
        raise ModelError(
            "the UNet has no self-attention at half the latent's size; leave self_attention of the guidance off"
        )
    mean = torch.stack(list(self_maps)).mean(dim=0)
    columns = found.flatten(start_dim=2).to(mean).mT  # [R, N, S]
    return (mean @ columns).mT.unflatten(-1, found.shape[-2:])


def normalised(maps: Tensor, guidance: RealCustomGuidance) -> Tensor:
    """Each map [R, S, h, w] divided by its maximum, or min-max, or as it is."""
    if guidance.normalise == "none":
        return maps
    if guidance.normalise == "max":
        return maps / maps.amax(dim=(-2, -1), keepdim=True).clamp_min(EPSILON)
    return min_max(maps)


def min_max(maps: Tensor) -> Tensor:
    """Each map rescaled to 0..1; a flat one becomes 0."""
    low = maps.amin(dim=(-2, -1), keepdim=True)
    return (maps - low) / (maps.amax(dim=(-2, -1), keepdim=True) - low).clamp_min(EPSILON)


def quantity(maps: Tensor, guidance: RealCustomGuidance) -> Tensor:
    """Each map [R, S, h, w] with the cells outside the scope set to 0: its max(1, int(scope h w)) largest stay, or
    those from `threshold` up; 1 in their place if `binary`."""
    if guidance.threshold is not None:
        kept = (maps >= guidance.threshold).to(maps)
    else:
        flat = maps.flatten(start_dim=2)
        count = max(1, int((guidance.scope or 1.0) * flat.shape[-1] + EPSILON))
        places = flat.topk(count, dim=-1).indices
        kept = torch.zeros_like(flat).scatter_(-1, places, 1.0).view_as(maps)
    return kept if guidance.binary else maps * kept


def halved(size: tuple[int, int]) -> tuple[int, int]:
    """Half a size, rounded up as the UNet does."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2
