"""Arithmetic whose result does not depend on an element's position in a tensor.

A vectorised kernel and its scalar tail may round `sin` or `atan2` differently, so the same image could differ by a bit
between two batches. Everything here uses only operations that IEEE 754 rounds correctly (+ - * / sqrt, comparisons,
floor), one torch operation each, so that nothing is fused or reduced in an order chosen by the library.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TAU = 6.283185307179586


def mix(a: Tensor | float, b: Tensor | float, w: Tensor) -> Tensor:
    """a where w = 0, b where w = 1."""
    return a + (b - a) * w


def fract(x: Tensor) -> Tensor:
    """x modulo 1, in [0, 1)."""
    return x - torch.floor(x)


def smooth(x: Tensor, low: float, high: float) -> Tensor:
    """Hermite step: 0 below `low`, 1 above `high` (reversed if high < low)."""
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def sqrt(x: Tensor) -> Tensor:
    """The square root of x [...] float32, correctly rounded.

    `torch.sqrt` of float32 on a CPU is that of a vector library, whose last bit differs between processors. A root in
    double precision, rounded once more, is the correctly rounded one: 53 bits are enough for twice 24 and two.
    """
    return torch.sqrt(x.double()).to(x.dtype)


def length(*parts: Tensor) -> Tensor:
    """Euclidean length of a vector given by its components."""
    total = parts[0] * parts[0]
    for part in parts[1:]:
        total = total + part * part
    return sqrt(total)


def normalize(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = length(x, y, z) + 1e-12
    return x / n, y / n, z / n


def wave(turns: Tensor) -> Tensor:
    """sin(2 pi turns), error below 0.002 (corrected parabola)."""
    r = turns - torch.floor(turns + 0.5)
    y = 8 * r - 16 * r * r.abs()
    return y + 0.225 * (y * y.abs() - y)


def angle(y: Tensor, x: Tensor) -> Tensor:
    """atan2(y, x) in turns, in (-0.5, 0.5], error below 0.0002 turns (odd polynomial of degree 7)."""
    ax, ay = x.abs(), y.abs()
    a = torch.minimum(ax, ay) / torch.maximum(torch.maximum(ax, ay), torch.full_like(ax, 1e-12))
    s = a * a
    r = ((-0.0464964749 * s + 0.15931422) * s - 0.327622764) * s * a + a
    r = r / TAU
    r = torch.where(ay > ax, 0.25 - r, r)
    r = torch.where(x < 0, 0.5 - r, r)
    return torch.where(y < 0, -r, r)


def shift(x: Tensor, dy: int, dx: int) -> Tensor:
    """x [..., H, W] moved down by dy and right by dx, the border repeated."""
    h, w = x.shape[-2:]
    rows = (torch.arange(h, device=x.device) - dy).clamp(0, h - 1)
    columns = (torch.arange(w, device=x.device) - dx).clamp(0, w - 1)
    return x[..., rows, :][..., columns]


def blur(x: Tensor, times: int = 1) -> Tensor:
    """x [..., H, W] through the binomial filter (1 2 1) in both directions."""
    for _ in range(times):
        x = (shift(x, 0, 1) + shift(x, 0, -1)) * 0.25 + x * 0.5
        x = (shift(x, 1, 0) + shift(x, -1, 0)) * 0.25 + x * 0.5
    return x


class Noise:
    """Seeded numbers and smooth random fields, one stream per image.

    seeds: one non-negative integer per image; the same seed gives the same values in any batch.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        size: int,
        device: torch.device | str,
        count: int = 1600,
    ) -> None:
        pools = [np.random.default_rng(seed).random(count, dtype=np.float32) for seed in seeds]
        self._pool = torch.from_numpy(np.stack(pools)).to(device)
        self._at, self.size = 0, size

    def _take(self, n: int) -> Tensor:
        if self._at + n > self._pool.shape[1]:
            self._at = 0
        self._at += n
        return self._pool[:, self._at - n : self._at]

    def number(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[B, 1, 1] uniform in [low, high)."""
        return self._take(1)[:, :, None] * (high - low) + low

    def numbers(self, n: int) -> Tensor:
        """[B, n] uniform in [0, 1)."""
        return self._take(n)

    def field(self, rows: int, columns: int | None = None) -> Tensor:
        """[B, H, W] in [0, 1]: a lattice of rows x columns random values, smoothly interpolated."""
        columns = columns or rows
        grid = self._take((rows + 1) * (columns + 1)).reshape(-1, rows + 1, columns + 1)
        for axis, cells in ((1, rows), (2, columns)):
            at = (torch.arange(self.size, device=grid.device) + 0.5) * (cells / self.size)
            low = at.floor().clamp(0, cells - 1)
            w = at - low
            w = w * w * (3 - 2 * w)
            a = grid.index_select(axis, low.long())
            b = grid.index_select(axis, low.long() + 1)
            grid = mix(a, b, w[:, None] if axis == 1 else w)
        return grid

    def grain(self, cells: int) -> Tensor:
        """[B, H, W] in [0, 1]: blocky values, a lattice of at most cells x cells repeated over the image."""
        pool = self._pool[:, : min(self._pool.shape[1], cells * cells)]
        n = pool.shape[1]
        at = torch.arange(self.size, device=pool.device)
        index = (at[:, None] * 769 + at[None, :] * 331 + (at[:, None] * at[None, :] * 7) + self._at * 13) % n
        self._at = (self._at + 1) % 512
        return pool[:, index.reshape(-1)].reshape(-1, self.size, self.size)
