"""Colours and surface patterns. A pattern is one function and one row of `PATTERNS`."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.toybox.rendering.exact import fract, length, sqrt, wave
from pipelines.toybox.rendering.sdf import Point

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.11, 0.11),
    "orange": (0.98, 0.50, 0.05),
    "yellow": (0.99, 0.87, 0.12),
    "green": (0.13, 0.62, 0.20),
    "cyan": (0.15, 0.83, 0.85),
    "blue": (0.12, 0.26, 0.88),
    "purple": (0.52, 0.17, 0.78),
    "pink": (0.99, 0.48, 0.72),
    "black": (0.07, 0.07, 0.08),
    "white": (0.96, 0.96, 0.95),
}
"""The ten named colours, sRGB in [0, 1]."""


def _edge(distance: Tensor, pixel: Tensor) -> Tensor:
    """Coverage in [0, 1] of the region where the signed distance is negative; `pixel` is a pixel's width there."""
    return (0.5 - distance / pixel).clamp(0, 1)


def plain(p: Point, scale: Tensor, phase: Tensor, pixel: Tensor) -> Tensor:
    return torch.zeros_like(p[0])


def stripes(p: Point, scale: Tensor, phase: Tensor, pixel: Tensor) -> Tensor:
    """Horizontal bands, a third of the height."""
    period = 0.50 + 0.16 * scale
    return _edge(((fract(p[1] / period + phase) - 0.5).abs() - 0.165) * period, pixel)


def _directions(count: int) -> list[tuple[float, float, float]]:
    """Points spread evenly over the sphere (Fibonacci lattice)."""
    k = np.arange(count) + 0.5
    y, turn = 1 - 2 * k / count, k * np.pi * (3 - np.sqrt(5))
    r = np.sqrt(1 - y * y)
    return [(float(a), float(b), float(c)) for a, b, c in zip(r * np.cos(turn), y, r * np.sin(turn), strict=True)]


_DOTS = _directions(22)


def dots(p: Point, scale: Tensor, phase: Tensor, pixel: Tensor) -> Tensor:
    """Round spots in 22 evenly spread directions from the subject's centre."""
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
    apart = sqrt((2 - 2 * best).clamp(min=0))
    return _edge((apart - 0.25 - 0.05 * scale) * far, pixel)


def dipped(p: Point, scale: Tensor, phase: Tensor, pixel: Tensor) -> Tensor:
    """Everything below the waist."""
    return _edge(p[1] + 0.07 - 0.14 * scale, pixel)


@dataclass(frozen=True)
class Pattern:
    """paint(point, scale [N] in [0, 1], phase [N] in [0, 1), pixel [N]) is the second colour's share [N] in [0, 1].

    Points are measured from the family's waist. The main colour keeps the larger part of the surface, so that it can be
    distinguished from the second one.

    word: its adjective. noun: its plural noun in "a red ball with white ...", None where only the adjective is used.
    """

    paint: Callable[[Point, Tensor, Tensor, Tensor], Tensor]
    word: str
    noun: str | None


PATTERNS: dict[str, Pattern] = {
    "plain": Pattern(plain, "plain", None),
    "stripes": Pattern(stripes, "striped", "stripes"),
    "dots": Pattern(dots, "dotted", "dots"),
    "dipped": Pattern(dipped, "two tone", None),
}
