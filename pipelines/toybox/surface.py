"""Colours and surface patterns. A pattern is one function and one row of `PATTERNS`."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.toybox.exact import angle, fract, length, wave
from pipelines.toybox.sdf import Point

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.11, 0.11),
    "orange": (0.98, 0.50, 0.05),
    "yellow": (0.99, 0.87, 0.12),
    "green": (0.13, 0.62, 0.20),
    "cyan": (0.15, 0.83, 0.85),
    "blue": (0.12, 0.26, 0.88),
    "purple": (0.52, 0.17, 0.78),
    "pink": (0.99, 0.48, 0.72),
    "brown": (0.47, 0.27, 0.12),
    "black": (0.07, 0.07, 0.08),
    "white": (0.96, 0.96, 0.95),
    "grey": (0.53, 0.54, 0.56),
}
"""The twelve named colours, sRGB in [0, 1]."""


def _edge(distance: Tensor, pixel: Tensor) -> Tensor:
    """Coverage in [0, 1] of the region where the signed distance is negative; `pixel` is a pixel's width there."""
    return (0.5 - distance / pixel).clamp(0, 1)


def _bands(coordinate: Tensor, period: Tensor | float, pixel: Tensor) -> Tensor:
    """Every second half period of `coordinate` covered."""
    return _edge(((fract(coordinate / period) - 0.5).abs() - 0.25) * period, pixel)


def plain(p: Point, scale: Tensor, phase: Tensor, pixel: Tensor) -> Tensor:
    return torch.zeros_like(p[0])


def stripes(p: Point, scale: Tensor, phase: Tensor, pixel: Tensor) -> Tensor:
    """Horizontal bands."""
    return _bands(p[1] + phase, 0.34 + 0.20 * scale, pixel)


def spiral(p: Point, scale: Tensor, phase: Tensor, pixel: Tensor) -> Tensor:
    """One or two slanted bands wound around the upright axis."""
    starts = torch.where(scale < 0.5, 1.0, 2.0)
    pitch = (0.50 + 0.12 * scale) * starts
    slope = pitch / (4.0 * (0.25 + length(p[0], p[2])))
    return _edge(
        ((fract(p[1] * starts / pitch + starts * angle(p[0], p[2]) + phase) - 0.5).abs() - 0.25) * pitch / starts,
        pixel * torch.sqrt(1 + slope * slope),
    )


def checks(p: Point, scale: Tensor, phase: Tensor, pixel: Tensor) -> Tensor:
    """Squares in rows and sectors around the upright axis."""
    sectors = torch.where(scale < 0.5, 4.0, 5.0)
    around = length(p[0], p[2]) * 6.2832 / sectors
    a = _bands(p[1] + phase, 0.52 + 0.16 * scale, pixel)
    b = _edge(
        ((fract(angle(p[0], p[2]) * sectors + phase) - 0.5).abs() - 0.25) * around,
        pixel,
    )
    return a + b - 2 * a * b


def _directions(count: int) -> list[tuple[float, float, float]]:
    """Points spread evenly over the sphere (Fibonacci lattice)."""
    k = np.arange(count) + 0.5
    y, turn = 1 - 2 * k / count, k * np.pi * (3 - np.sqrt(5))
    r = np.sqrt(1 - y * y)
    return [(float(a), float(b), float(c)) for a, b, c in zip(r * np.cos(turn), y, r * np.sin(turn), strict=True)]


_DOTS = _directions(30)


def dots(p: Point, scale: Tensor, phase: Tensor, pixel: Tensor) -> Tensor:
    """Round spots seen from the subject's centre in thirty even directions."""
    far = length(*p) + 1e-9
    sine, cosine = wave(phase), wave(phase + 0.25)
    x, y, z = (
        (cosine * p[0] + sine * p[2]) / far,
        p[1] / far,
        (cosine * p[2] - sine * p[0]) / far,
    )
    best = torch.full_like(far, -1.0)
    for a, b, c in _DOTS:
        best = torch.maximum(best, x * a + y * b + z * c)
    apart = torch.sqrt((2 - 2 * best).clamp(min=0))
    return _edge((apart - 0.19 - 0.07 * scale) * far, pixel)


def halves(p: Point, scale: Tensor, phase: Tensor, pixel: Tensor) -> Tensor:
    """One side of an upright or slanting plane through the centre."""
    return _edge(
        wave(phase) * p[0] + wave(phase + 0.25) * p[2] + (scale - 0.5) * 1.2 * p[1],
        pixel,
    )


@dataclass(frozen=True)
class Pattern:
    """paint(point, scale [N] in [0, 1], phase [N] in [0, 1), pixel [N]) gives the second colour's share [N] in [0, 1].

    word: its adjective. noun: its plural noun in "a red ball with white ...", None where only the adjective is used.
    """

    paint: Callable[[Point, Tensor, Tensor, Tensor], Tensor]
    word: str
    noun: str | None


PATTERNS: dict[str, Pattern] = {
    "plain": Pattern(plain, "plain", None),
    "stripes": Pattern(stripes, "striped", "stripes"),
    "spiral": Pattern(spiral, "spiral", "spirals"),
    "checks": Pattern(checks, "checked", "checks"),
    "dots": Pattern(dots, "dotted", "dots"),
    "halves": Pattern(halves, "two tone", None),
}
