"""Running frozen networks: without gradients, in batches of one fixed size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from runtime.errors import ModelError

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def freeze(module: M, device: str | torch.device) -> M:
    """`module` on `device`, in eval mode, with gradients disabled."""
    return module.to(device).eval().requires_grad_(False)


def fixed_batches(rows: Sequence[T], size: int) -> Iterator[tuple[list[T], int]]:
    """(batch of exactly `size` rows, number of real ones) over `rows`, the last batch padded with its last row.

    Matrix libraries choose a kernel, and with it an order of summation, by batch size: with one fixed size, a row's
    result does not depend on the number of other rows.
    """
    for start in range(0, len(rows), size):
        batch = list(rows[start : start + size])
        yield batch + batch[-1:] * (size - len(batch)), len(batch)


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images [B, 3, H, W] in 0..1, less `mean` and divided by `std` of each channel."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def require_layers(layers: Sequence[int], blocks: int, name: str) -> None:
    """Raise ModelError with the encoder's `name` unless `layers` are some of its blocks, ascending."""
    if not layers or list(layers) != sorted({layer for layer in layers if 0 <= layer < blocks}):
        raise ModelError(f"{name}: layers {list(layers)} must ascend within its blocks 0..{blocks - 1}")
