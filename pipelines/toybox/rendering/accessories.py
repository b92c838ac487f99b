"""Accessories a subject can wear. An accessory is one distance function and one row of `ACCESSORIES`.

Each is modelled in its own frame: the anchor is the origin, the anchor's radius is 1, y up, front towards +z.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipelines.toybox.rendering.exact import angle, fract, length
from pipelines.toybox.rendering.sdf import TRIM, WORN, Anchors, Parts, Point, cuboid, slab, torus


def hat(p: Point) -> Parts:
    x, y, z = p
    r = length(x, z)
    brim = slab(r - 1.22, (y - 0.04).abs() - 0.03) - 0.04
    crown = slab(r - 0.74, (y - 0.52).abs() - 0.48) - 0.03
    band = slab(r - 0.80, (y - 0.24).abs() - 0.12) - 0.02
    return [(WORN, torch.minimum(brim, crown)), (TRIM, band)]


def crown(p: Point) -> Parts:
    x, y, z = p
    r = length(x, z)
    tooth = (fract(angle(x, z) * 6 + 0.5) - 0.5).abs()
    height = 0.95 - 1.1 * tooth
    wall = torch.maximum((r - 0.86 - 0.12 * y).abs() - 0.09, torch.maximum((y - height) * 0.6, -y)) * 0.8
    turn = torch.floor(angle(x, z) * 6 + 0.5) / 6
    gem = torch.maximum((r - 0.98).abs() - 0.08, length((angle(x, z) - turn) * 6.2832, y - 0.25) - 0.17)
    return [(WORN, wall), (TRIM, gem * 0.8)]


def scarf(p: Point) -> Parts:
    x, y, z = p
    r = length(x, z) - 0.04
    loop, stripe = torus(r, (y - 0.14) * 0.85, 1.0, 0.17), torus(r, (y + 0.14) * 0.85, 1.0, 0.17)
    lean = x - 0.42 + 0.25 * y
    tail = cuboid(lean, y + 0.52, z - 1.12, 0.20, 0.50, 0.07) - 0.04
    fringe = cuboid(lean, y + 0.86, z - 1.12, 0.23, 0.10, 0.10) - 0.04
    return [(WORN, torch.minimum(loop, tail)), (TRIM, torch.minimum(stripe, fringe))]


def glasses(p: Point) -> Parts:
    x, y, z = p
    ax = x.abs()
    r = length(ax - 0.54, y)
    rims = torus(r, z - 0.06, 0.43, 0.13)
    bridge = cuboid(x, y - 0.06, z - 0.06, 0.16, 0.07, 0.07)
    arms = cuboid(ax - 1.0, y - 0.06, z + 0.30, 0.06, 0.07, 0.42)
    lenses = slab(r - 0.43, (z - 0.05).abs() - 0.05)
    return [(WORN, torch.minimum(torch.minimum(rims, bridge), arms)), (TRIM, lenses)]


REACH = 1.85
"""Radius of a sphere around the anchor that encloses any accessory, in its own frame."""


@dataclass(frozen=True)
class Accessory:
    """One accessory: its parts, the anchor it sits on, its two colours (sRGB in [0, 1]).

    extents: (distance from the anchor's vertical axis, height) of its outermost circles, in its own frame.
    """

    parts: Callable[[Point], Parts]
    anchor: str
    colour: tuple[float, float, float]
    trim: tuple[float, float, float]
    extents: tuple[tuple[float, float], ...]


def fit(row: Accessory, anchors: Anchors) -> tuple[float, float]:
    """Scale and height (<= 0) at which a dressed subject stays inside the unit sphere.

    A grid search finds the smallest sphere around a point of the vertical axis that encloses the accessory's extents
    and the part of the subject's unit sphere above its base.
    """
    x, y, z, radius = getattr(anchors, row.anchor)
    aside = math.hypot(x, z)
    circles = [(aside + radius * far, y + radius * up) for far, up in row.extents]
    best = (2.0, 0.0)
    for step in range(25):
        middle = 0.02 * step
        reach = max(
            math.sqrt(1 - 2 * middle * anchors.base + middle * middle),
            *(math.hypot(far, up - middle) for far, up in circles),
        )
        best = min(best, (reach, middle))
    return 1 / best[0], -best[1] / best[0]


ACCESSORIES: dict[str, Accessory] = {
    "hat": Accessory(hat, "top", (0.16, 0.15, 0.22), (0.90, 0.15, 0.15), ((1.28, 0.05), (0.80, 1.05))),
    "scarf": Accessory(
        scarf,
        "neck",
        (0.85, 0.10, 0.14),
        (1.0, 0.95, 0.88),
        ((1.27, 0.0), (1.40, -0.3), (1.45, -1.08)),
    ),
    "crown": Accessory(
        crown,
        "top",
        (0.98, 0.78, 0.16),
        (0.85, 0.12, 0.25),
        ((1.08, 0.3), (1.08, 0.98)),
    ),
    "glasses": Accessory(
        glasses,
        "face",
        (0.08, 0.08, 0.10),
        (0.55, 0.85, 0.95),
        ((1.14, 0.25), (0.65, 0.57), (0.65, -0.57)),
    ),
}
