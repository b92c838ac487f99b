"""Two image towers that read a reference at two resolutions, as RealCustom++'s official code does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model.backbones.clip import Clip, load_clip, transformer_sizes
from model.backbones.frozen import fixed_batches
from model.backbones.variant import DetailSpec, TowerSpec
from model.backbones.vision import Vision, load_dino, load_siglip
from runtime.errors import ModelError

LOW, HIGH, SHALLOW = (0,), (1, 2, 3, 4), (5, 6, 7)
"""Places on the features' K axis: the low view's deep layer, the four high views' deep layer, and the low view's
shallow layers."""


@dataclass(frozen=True)
class TwoTowers:
    """Two frozen image encoders; their tokens at a place are joined by channel. Results are float32 on their device."""

    towers: tuple[Clip | Vision, Clip | Vision]
    spec: DetailSpec
    preprocess: Callable[[Image.Image], Tensor]
    """A photo to the square that views are taken from, [3, 2 s, 2 s] uint8, s the side of a view."""
    batch_size: int
    name: str
    """Both encoders' names with the blocks that are read, and how views are made: the encoder id in adapters."""

    @torch.no_grad()
    def hidden_states(self, images: Sequence[Image.Image], layers: Sequence[int]) -> Tensor:
        """Patch tokens [B, K, N, d] of photos, K in the order of `layers`, which are LOW, HIGH and SHALLOW places.

        Raises ModelError for other layers.
        """
        if not layers or list(layers) != sorted({layer for layer in layers if layer in (*LOW, *HIGH, *SHALLOW)}):
            raise ModelError(f"{self.name}: layers {list(layers)} must ascend within 0..{SHALLOW[-1]}")
        rows = [self.states(batch, layers)[:count] for batch, count in fixed_batches(images, self.batch_size)]
        # Of no image the widths are those of a white one.
        return torch.cat(rows) if rows else self.states([Image.new("RGB", (1, 1), "white")], layers)[:0]

    def states(self, images: Sequence[Image.Image], layers: Sequence[int]) -> Tensor:
        """`hidden_states` of one batch, one view after the other: all at once would take five times the memory."""
        squares = torch.stack([self.preprocess(image) for image in images]).to(self.device).float() / 255
        first, second = self.spec.towers
        deep = (first.block, second.block)
        blocks = dict(zip((*LOW, *SHALLOW), [deep, *zip(first.shallow, second.shallow, strict=True)], strict=True))
        found: dict[int, Tensor] = {}
        if low := [layer for layer in layers if layer in blocks]:
            states = self.joined(low_view(squares, self.spec.side), [blocks[layer] for layer in low])
            found = dict(zip(low, states.unbind(dim=1), strict=True))
        views = high_views(squares, self.spec.split)
        for layer in layers:
            if layer in HIGH:
                found[layer] = self.joined(views[:, layer - HIGH[0]], [deep])[:, 0]
        return torch.stack([found[layer] for layer in layers], dim=1)

    def joined(self, view: Tensor, blocks: Sequence[tuple[int, int]]) -> Tensor:
        """Both towers' tokens [B, K, N, d] of a view [B, 3, s, s] after each pair of blocks."""
        parts = []
        for tower, wanted in zip(self.towers, zip(*blocks, strict=True), strict=True):
            ascending = sorted(set(wanted))
            states = tower.patch_states(view, ascending)
            parts.append(states[:, [ascending.index(block) for block in wanted]])
        return torch.cat(parts, dim=-1)

    @property
    def device(self) -> torch.device:
        return self.towers[0].device


def low_view(squares: Tensor, side: int) -> Tensor:
    """Squares [B, C, 2 s, 2 s] at half their side [B, C, s, s], corner pixels kept."""
    return F.interpolate(squares, (side, side), mode="bilinear", align_corners=True)


def high_views(squares: Tensor, split: str) -> Tensor:
    """Squares [B, C, 2 s, 2 s] to four views [B, 4, C, s, s], row by row.

    interleave: view 2 i + j is the whole image at every second pixel, from row i and column j on, in the channel order
    of `torch.nn.functional.pixel_unshuffle`. tiles: it is the quarter in row i and column j.
    """
    if split == "interleave":
        return F.pixel_unshuffle(squares, 2).unflatten(1, (-1, 4)).transpose(1, 2)
    rows = [half.chunk(2, dim=-1) for half in squares.chunk(2, dim=-2)]
    return torch.stack([view for row in rows for view in row], dim=1)


def squeeze(image: Image.Image, side: int) -> Tensor:
    """A photo as a square [3, side, side] uint8, whatever its proportions."""
    pixels = np.array(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def load_towers(
    spec: DetailSpec, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 32
) -> TwoTowers:
    """The frozen towers of `spec`, computing in `dtype`.

    Raises ModelError if a folder is missing or of another kind, a block does not exist, or a tower does not read views
    of this side as as many tokens as the other.
    """
    towers = tuple(load_tower(tower, device, dtype, batch_size) for tower in spec.towers)
    counts = [fitting(tower, wanted, spec.side) for tower, wanted in zip(towers, spec.towers, strict=True)]
    if counts[0] != counts[1]:
        raise ModelError(
            f"detail: at {spec.side} px '{spec.towers[0].path}' has {counts[0]} tokens, but '{spec.towers[1].path}' has"
            f" {counts[1]}, and they are joined place by place; name towers with equal patches"
        )
    name = towers_name([tower.name for tower in towers], spec)
    return TwoTowers((towers[0], towers[1]), spec, partial(squeeze, side=2 * spec.side), batch_size, name)


def load_tower(spec: TowerSpec, device: str | torch.device, dtype: torch.dtype, batch_size: int) -> Clip | Vision:
    """One tower; of a CLIP only the image half."""
    if spec.kind == "clip":
        return image_tower(load_clip(spec, device, dtype, batch_size))
    return (load_dino if spec.kind == "dino" else load_siglip)(spec, device, dtype, batch_size)


def image_tower(clip: Clip) -> Clip:
    """`clip` without its text tower, which would only waste memory."""
    for name, child in clip.model.named_children():
        if name != "visual":
            child.to("meta")
    return clip


def fitting(tower: Clip | Vision, spec: TowerSpec, side: int) -> int:
    """Patches of an image of `side` px; ModelError if a tower does not read such images, or lacks a block."""
    if isinstance(tower, Clip):
        sizes = transformer_sizes(tower.model.visual, spec.path)
        blocks, patch, reads = sizes.blocks, sizes.patch, tower.model.visual.image_size[0]
    else:
        config = tower.model.config
        if not hasattr(config, "num_hidden_layers"):
            raise ModelError(f"{spec.path}: hidden states need a transformer, but this is a {config.model_type}")
        blocks, patch = config.num_hidden_layers, config.patch_size
        reads = side if tower.reads_any_size else config.image_size
    if max(spec.block, *spec.shallow) >= blocks:
        raise ModelError(f"{spec.path}: block {max(spec.block, *spec.shallow)} is beyond its blocks 0..{blocks - 1}")
    if reads != side:
        raise ModelError(
            f"{spec.path}: reads images of {reads} px, but the variant's detail.side is {side}; make them equal"
        )
    count: int = (side // patch) ** 2
    return count


def towers_name(names: Sequence[str], spec: DetailSpec) -> str:
    """The name of the towers named `names`."""
    parts = [
        f"{name} ({tower.block}; {' '.join(map(str, tower.shallow))})"
        for name, tower in zip(names, spec.towers, strict=True)
    ]
    return f"{' + '.join(parts)}, {spec.split} {spec.side} px"
