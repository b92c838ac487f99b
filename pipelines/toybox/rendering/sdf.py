"""Signed distance functions of the ten families.

A family is one function and one row of `FAMILIES`. Coordinates are the subject's own: y up, front towards +z, all of it
inside the unit sphere. A point is three tensors [N]; `q` are the subject's four proportions in [0, 1], tensors [N]. A
function returns its parts as (part id, distance [N]); their minimum is the distance of the family. Distances are exact
or lower bounds of the true one (Lipschitz constant about 1), after https://iquilezles.org/articles/distfunctions
(Quilez).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.toybox.rendering.exact import length, sqrt

BODY, DETAIL, PALE, DARK, WORN, TRIM = 1, 2, 3, 4, 16, 17
"""Part ids: patterned body, part in the third colour, fixed pale part, fixed dark part, accessory, its trimming. From
WORN on, a part is not the subject's own."""

Point = tuple[Tensor, Tensor, Tensor]
Proportions = tuple[Tensor, ...]
Parts = list[tuple[int, Tensor]]


@dataclass(frozen=True)
class Anchors:
    """Where the ground and accessories touch a subject, in its coordinates.

    base: y of the ground it stands on. top, neck, face: (x, y, z, radius) of where a hat rests, of what a scarf is
    wound around, and of the middle of a pair of glasses (there radius is half their width).
    """

    base: float
    top: tuple[float, float, float, float]
    neck: tuple[float, float, float, float]
    face: tuple[float, float, float, float]


def ellipsoid(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    rx: Tensor | float,
    ry: Tensor | float,
    rz: Tensor | float,
) -> Tensor:
    """First-order distance to an ellipsoid with half axes rx, ry, rz."""
    ax, ay, az = x / rx, y / ry, z / rz
    k = length(ax, ay, az)
    return k * (k - 1) / (length(ax / rx, ay / ry, az / rz) + 1e-9)


def slab(a: Tensor, b: Tensor) -> Tensor:
    """Distance to the product of two intervals given by their signed distances a and b."""
    return torch.minimum(torch.maximum(a, b), torch.zeros_like(a)) + length(a.clamp(min=0), b.clamp(min=0))


def cuboid(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    hx: Tensor | float,
    hy: Tensor | float,
    hz: Tensor | float,
) -> Tensor:
    """Distance to a box with half sides hx, hy, hz."""
    a, b, c = x.abs() - hx, y.abs() - hy, z.abs() - hz
    inside = torch.maximum(a, torch.maximum(b, c)).clamp(max=0)
    return inside + length(a.clamp(min=0), b.clamp(min=0), c.clamp(min=0))


def torus(r: Tensor, along: Tensor, radius: Tensor | float, tube: Tensor | float) -> Tensor:
    """Distance to a torus; r is the distance from its axis, `along` the coordinate on it."""
    return length(r - radius, along) - tube


def join(a: Tensor, b: Tensor, k: float) -> Tensor:
    """Union with a fillet of about k/4 (quadratic smooth minimum)."""
    h = (k - (a - b).abs()).clamp(min=0)
    return torch.minimum(a, b) - h * h * (0.25 / k)


def ball(p: Point, q: Proportions) -> Parts:
    x, y, z = p
    return [
        (
            BODY,
            ellipsoid(x, y, z, 0.66 + 0.14 * q[1], 0.62 + 0.16 * q[0], 0.66 + 0.14 * q[1]),
        )
    ]


def ball_anchors(q: tuple[float, ...]) -> Anchors:
    r, h = 0.66 + 0.14 * q[1], 0.62 + 0.16 * q[0]
    return Anchors(-h, (0, h - 0.06, 0, 0.42), (0, -0.2 * h, 0, r), (0, 0.2 * h, r * 0.98, 0.46))


def box(p: Point, q: Proportions) -> Parts:
    x, y, z = p
    hx, hy, hz = 0.40 + 0.16 * q[0], 0.36 + 0.18 * q[1], 0.40 + 0.16 * q[2]
    body = cuboid(x, y, z, hx - 0.03, hy - 0.03, hz - 0.03) - 0.03
    around = torch.minimum(
        cuboid(x, y, z, torch.full_like(hx, 0.07), hy, hz), cuboid(x, y, z, hx, hy, torch.full_like(hz, 0.07))
    )
    bow = ellipsoid(x.abs() - 0.15, y - hy - 0.07, z, 0.16, 0.09, 0.11)
    return [(BODY, body), (DETAIL, torch.minimum(around - 0.025, bow))]


def box_anchors(q: tuple[float, ...]) -> Anchors:
    hx, hy, hz = 0.40 + 0.16 * q[0], 0.36 + 0.18 * q[1], 0.40 + 0.16 * q[2]
    return Anchors(
        -hy,
        (0, hy, 0, 0.40),
        (0, 0.0, 0, 1.12 * max(hx, hz)),
        (0, 0.12 * hy, hz + 0.05, 0.40),
    )


def can(p: Point, q: Proportions) -> Parts:
    x, y, z = p
    radius, half = 0.38 + 0.16 * q[0], 0.56 + 0.22 * q[1]
    r = length(x, z)
    body = slab(r - radius + 0.03, y.abs() - half + 0.05) - 0.03
    rims = torus(r, y.abs() - half + 0.03, radius - 0.045, 0.05)
    lid = slab(r - radius + 0.06, (y - half + 0.02).abs() - 0.03)
    tab = cuboid(x, y - half - 0.01, z - 0.1, 0.05, 0.025, 0.12)
    return [(BODY, body), (PALE, torch.minimum(rims, lid)), (DARK, tab)]


def can_anchors(q: tuple[float, ...]) -> Anchors:
    radius, half = 0.38 + 0.16 * q[0], 0.56 + 0.22 * q[1]
    return Anchors(
        -half - 0.02,
        (0, half, 0, 0.9 * radius),
        (0, 0.15, 0, radius),
        (0, 0.3, radius + 0.03, 0.40),
    )


def cone(p: Point, q: Proportions) -> Parts:
    x, y, z = p
    bottom, tip = 0.42 + 0.14 * q[0], 0.04 + 0.10 * q[1]
    r = length(x, z)
    y = y + 0.04
    slope = (bottom - tip) / 1.55
    side = (r - bottom + slope * (y + 0.66)) / sqrt(1 + slope * slope)
    body = slab(side, (y - 0.115).abs() - 0.775)
    plate = slab(r - 0.52 - 0.10 * q[2], (y + 0.66).abs() - 0.05) - 0.02
    return [(BODY, body), (DETAIL, plate)]


def cone_anchors(q: tuple[float, ...]) -> Anchors:
    bottom, tip = 0.42 + 0.14 * q[0], 0.04 + 0.10 * q[1]

    def radius(y: float) -> float:
        return bottom - (bottom - tip) / 1.55 * (y + 0.70)

    return Anchors(
        -0.77,
        (0, 0.6, 0, radius(0.6) + 0.13),
        (0, 0.02, 0, radius(0.02)),
        (0, 0.28, radius(0.28), 0.34),
    )


def ring(p: Point, q: Proportions) -> Parts:
    x, y, z = p
    radius, tube = 0.53 + 0.06 * q[0], 0.19 + 0.06 * q[1]
    along = 0.906 * z - 0.423 * y
    up = 0.906 * y + 0.423 * z + 0.13
    hoop = torus(length(x, up), along, radius, tube)
    stone = ((x.abs() + along.abs() + (up - radius - tube - 0.02).abs()) - 0.22 - 0.03 * q[2]) * 0.577
    return [(BODY, hoop), (DETAIL, stone)]


def ring_anchors(q: tuple[float, ...]) -> Anchors:
    radius, tube = 0.53 + 0.06 * q[0], 0.19 + 0.06 * q[1]
    reach = radius + tube
    return Anchors(
        0.906 * (-0.13 - radius) - tube,
        (0, 0.906 * (reach + 0.04), 0.423 * (reach - 0.1), 0.32),
        (0, -0.05, 0.0, 0.98 * reach),
        (0, 0.42, 0.2 + tube + 0.12, 0.40),
    )


def gem(p: Point, q: Proportions) -> Parts:
    x, y, z = p
    width, crown, depth = 0.62 + 0.12 * q[0], 0.42 + 0.14 * q[1], 0.74 + 0.14 * q[2]
    y = y - 0.12
    ax, az = x.abs(), z.abs()
    even = torch.maximum(torch.maximum(ax, az), (ax + az) * 0.70711)
    odd = torch.maximum(ax * 0.92388 + az * 0.38268, ax * 0.38268 + az * 0.92388)
    upper = torch.maximum((even - width) * 0.60 + y * 0.80, (odd - width) * 0.74 + (y - 0.03) * 0.67)
    scale = sqrt(width * width + depth * depth)
    lower = ((even - width) * depth - y * width) / scale
    return [
        (
            BODY,
            torch.maximum(torch.maximum(upper, y - crown), torch.maximum(lower, odd - width)),
        )
    ]


def gem_anchors(q: tuple[float, ...]) -> Anchors:
    width, crown, depth = 0.62 + 0.12 * q[0], 0.42 + 0.14 * q[1], 0.74 + 0.14 * q[2]
    return Anchors(
        0.12 - depth,
        (0, 0.12 + crown, 0, 0.42),
        (0, -0.12, 0, 0.72 * width),
        (0, 0.13, width, 0.46),
    )


def mug(p: Point, q: Proportions) -> Parts:
    x, y, z = p
    radius, half, flare = 0.44 + 0.11 * q[0], 0.48 + 0.18 * q[1], 0.08 * q[2]
    x = x + 0.14
    r = length(x, z) - flare * (y + half) * 0.6
    outer = slab(r - radius + 0.02, y.abs() - half + 0.02) - 0.02
    inner = torch.maximum(r - radius + 0.08, -(y + half - 0.12))
    body = torch.maximum(outer, 0.04 - inner)
    lining = torch.maximum(torch.maximum(outer, -inner), inner - 0.04)
    handle = torus(length(x - radius, (y - 0.02) * 0.85), z, 0.24 + 0.06 * q[3], 0.07)
    return [
        (BODY, torch.minimum(body, torch.maximum(handle, 0.04 - inner))),
        (PALE, lining),
    ]


def mug_anchors(q: tuple[float, ...]) -> Anchors:
    radius, half = 0.44 + 0.12 * q[0], 0.48 + 0.20 * q[1]
    return Anchors(
        -half,
        (-0.14, half, 0, radius),
        (-0.14, -0.1, 0, radius + 0.03),
        (-0.14, 0.15, radius + 0.06, 0.42),
    )


def mushroom(p: Point, q: Proportions) -> Parts:
    x, y, z = p
    stem, wide, tall = 0.19 + 0.12 * q[0], 0.62 + 0.20 * q[1], 0.55 + 0.25 * q[2]
    r = length(x, z)
    y0 = y - 0.05
    cap = torch.maximum(ellipsoid(x, y0, z, wide, tall, wide), -0.05 - y0) - 0.02
    foot = slab(r - stem - 0.08 * (0.2 - y) * (0.2 - y), (y + 0.36).abs() - 0.42) - 0.02
    return [(BODY, cap), (PALE, foot)]


def mushroom_anchors(q: tuple[float, ...]) -> Anchors:
    stem, wide, tall = 0.19 + 0.12 * q[0], 0.62 + 0.20 * q[1], 0.55 + 0.25 * q[2]
    return Anchors(
        -0.8,
        (0, 0.01 + tall, 0, 0.42),
        (0, -0.22, 0, stem + 0.04),
        (0, 0.24, 0.95 * wide, 0.40),
    )


def rocket(p: Point, q: Proportions) -> Parts:
    x, y, z = p
    wide, fin = 0.30 + 0.12 * q[0], 0.12 * q[1]
    hull = ellipsoid(x, y - 0.02, z, wide, 0.95, wide)
    body = torch.maximum(hull, -(y + 0.62))
    nose = torch.maximum(hull - 0.015, 0.56 + 0.08 * q[2] - y)
    across, off = torch.maximum(x.abs(), z.abs()), torch.minimum(x.abs(), z.abs())
    fins = torch.maximum(off - 0.045, torch.maximum(across - 0.46 - fin, 0.7071 * (across + y) - 0.06))
    fins = torch.maximum(
        fins,
        torch.maximum(-0.82 - y + 0.35 * (0.5 - across).clamp(min=0), 0.15 - across),
    )
    window = torch.maximum(hull - 0.02, length(x, y - 0.16, z.abs() - wide) - 0.17)
    nozzle = slab(length(x, z) - 0.19, (y + 0.66).abs() - 0.08)
    return [
        (BODY, body),
        (DETAIL, torch.minimum(nose, fins)),
        (PALE, window),
        (DARK, nozzle),
    ]


def rocket_anchors(q: tuple[float, ...]) -> Anchors:
    wide = 0.30 + 0.12 * q[0]
    return Anchors(-0.82, (0, 0.72, 0, 0.30), (0, -0.12, 0, wide), (0, 0.36, wide, 0.36))


def duck(p: Point, q: Proportions) -> Parts:
    x, y, z = p
    wide, head, lift = 0.44 + 0.12 * q[0], 0.27 + 0.09 * q[1], 0.10 * q[2]
    body = ellipsoid(x, y + 0.34, z + 0.06, wide, 0.36 + 0.06 * q[3], 0.66)
    tail = ellipsoid(x, y + 0.06, z + 0.62, 0.20, 0.24, 0.18)
    skull = length(x, y - 0.34 - lift, z - 0.30) - head
    neck = length(x, y - 0.05, z - 0.26) - 0.24
    bird = join(join(join(body, tail, 0.18), neck, 0.15), skull, 0.12)
    beak = ellipsoid(x, y - 0.28 - lift, z - 0.30 - head - 0.06, 0.17, 0.075, 0.20)
    eyes = length(x.abs() - 0.55 * head, y - 0.42 - lift, z - 0.30 - 0.76 * head) - 0.075
    return [(BODY, bird), (DETAIL, beak), (DARK, eyes)]


def duck_anchors(q: tuple[float, ...]) -> Anchors:
    head, lift = 0.27 + 0.09 * q[1], 0.10 * q[2]
    return Anchors(
        -0.70 - 0.06 * q[3],
        (0, 0.34 + lift + 0.8 * head, 0.28, 0.85 * head),
        (0, 0.08, 0.26, 0.27),
        (0, 0.43 + lift, 0.32 + head, 0.9 * head),
    )


@dataclass(frozen=True)
class Family:
    """A family of subjects: its parts, its anchors, and whether DreamBench would call it a live subject.

    waist: height at which patterns begin; a two tone subject changes colour near it.
    """

    parts: Callable[[Point, Proportions], Parts]
    anchors: Callable[[tuple[float, ...]], Anchors]
    waist: float = 0.0
    live: bool = False


FAMILIES: dict[str, Family] = {
    "ball": Family(ball, ball_anchors, waist=0.1),
    "box": Family(box, box_anchors),
    "can": Family(can, can_anchors),
    "cone": Family(cone, cone_anchors, waist=-0.25),
    "ring": Family(ring, ring_anchors, waist=-0.15),
    "gem": Family(gem, gem_anchors, waist=0.08),
    "mug": Family(mug, mug_anchors, waist=-0.08),
    "mushroom": Family(mushroom, mushroom_anchors, waist=0.36),
    "rocket": Family(rocket, rocket_anchors, waist=-0.12),
    "duck": Family(duck, duck_anchors, waist=-0.22, live=True),
}


def union(parts: Parts) -> Tensor:
    """The distance [N] to the nearest part."""
    distance = parts[0][1]
    for _, other in parts[1:]:
        distance = torch.minimum(distance, other)
    return distance


def nearest(parts: Parts) -> Tensor:
    """The id [N] (int64) of the nearest part; the earlier one wins a tie."""
    distance, which = (
        parts[0][1],
        torch.full_like(parts[0][1], parts[0][0], dtype=torch.int64),
    )
    for part, other in parts[1:]:
        closer = other < distance
        distance = torch.where(closer, other, distance)
        which = torch.where(closer, torch.full_like(which, part), which)
    return which
