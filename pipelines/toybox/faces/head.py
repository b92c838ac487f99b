"""The distance function of a person: head, hair, beard, neck and shoulders.

Coordinates as in `pipelines.toybox.rendering.sdf`: y up, front towards +z; the head's centre is near (0, 0.2, 0), its
half height 0.5. Hair and beard choose the shape (`HAIR`, `BEARDS`); everything else comes as numbers, see `Face`.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache

import torch
from torch import Tensor

from pipelines.toybox.rendering.exact import length, sqrt, wave
from pipelines.toybox.rendering.sdf import BODY, Anchors, Parts, Point, Proportions, ellipsoid, join, slab, torus

SKIN, HAIR, BROW, WHITE, IRIS, PUPIL, LIPS, MOUTH = BODY, 2, 3, 4, 5, 6, 7, 8
GARMENT, COLLAR = 18, 19
"""Part ids; those of the garment are not the subject's own."""


@dataclass(frozen=True)
class Face:
    """The numbers of a face, each in [0, 1] unless said otherwise; what `head` gets as `q`, in this order.

    Traits: width of the head, jaw, distance and size of the eyes, thickness of the brows, size of the nose, width of
    the mouth. Expression: curve of the mouth in [-1, 1], how far it is open (to 1.2), how much the brows are raised (to
    1.6), their tilt in [-1, 1] (1: the inner ends up), how far the eyes are open (to 1.25).
    """

    width: float
    jaw: float
    spacing: float
    eye: float
    brow: float
    nose: float
    mouth: float
    curve: float = 0.0
    open: float = 0.0
    raised: float = 0.0
    tilt: float = 0.0
    lids: float = 1.0

    def numbers(self) -> tuple[float, ...]:
        return astuple(self)


def _skull_width(width: Tensor) -> Tensor:
    return 0.40 + 0.08 * width


def _front(x: Tensor, y: Tensor | float, half: Tensor) -> Tensor:
    """z of the skull's front at x and y; half: its half width."""
    across, up = x / half, (y - 0.24) / 0.46
    return 0.44 * sqrt((1 - across * across - up * up).clamp(min=0.02)) - 0.02


def _chin(x: Tensor, y: Tensor | float, half: Tensor) -> Tensor:
    """z of the jaw's front at x and y; half: its half width."""
    across, up = x / half, (y + 0.06) / 0.30
    return 0.30 * sqrt((1 - across * across - up * up).clamp(min=0.02)) + 0.07


def _bare(p: Point, q: Proportions) -> Parts:
    """The head without hair, and what it wears."""
    x, y, z = p
    width, jaw, spacing, eye, brow, nose, mouth, curve, opened, raised, tilt, lids = q
    half, chin = _skull_width(width), 0.25 + 0.13 * jaw
    skull = ellipsoid(x, y - 0.24, z + 0.02, half, 0.46, 0.44)
    face = join(skull, ellipsoid(x, y + 0.06, z - 0.06, chin, 0.32, 0.31), 0.14)
    neck = slab(length(x, z + 0.05) - 0.18, (y + 0.42).abs() - 0.30)
    ears = ellipsoid(x.abs() - half, y - 0.16, z + 0.04, 0.06, 0.11, 0.07)
    bridge = ellipsoid(x, y - 0.09, z - 0.41, 0.045 + 0.045 * nose, 0.08 + 0.04 * nose, 0.08 + 0.07 * nose)
    skin = join(torch.minimum(join(face, neck, 0.06), ears), bridge, 0.05)

    side, size = x.abs(), 0.085 + 0.035 * eye
    at = 0.145 + 0.055 * spacing
    depth = _front(at, 0.22, half) - 0.45 * size
    tall = size * (0.25 + 0.60 * lids)
    white = ellipsoid(side - at, y - 0.22, z - depth, size * 1.15, tall, size)
    ring, dot = 0.60 * size, 0.30 * size
    iris = ellipsoid(side - at, y - 0.22, z - depth - 0.52 * size, ring, torch.minimum(ring, tall), ring)
    pupil = ellipsoid(side - at, y - 0.22, z - depth - 0.86 * size, dot, torch.minimum(dot, tall), dot)

    level = 0.22 + size + 0.075 + 0.045 * raised
    slope = y - level + 0.35 * tilt * (side - at)
    forehead = _front(side.clamp(max=0.35), level, half)
    brows = ellipsoid(side - at, slope, z - forehead, 0.125, 0.024 + 0.030 * brow, 0.045)

    reach = 0.095 + 0.065 * mouth + 0.03 * curve.clamp(min=0)
    along = (x / reach).clamp(-1.2, 1.2)
    middle = y + 0.125 - 0.075 * curve * (along * along - 0.35)
    front = _chin(x.clamp(-0.2, 0.2), -0.12, chin)
    # The bend makes the distance grow faster than the way to the surface: less of it never promises too much. A closed
    # mouth has its inside behind the lips, since a flat one would bound distances badly.
    lips = ellipsoid(x, middle, z - front, reach, 0.034 + 0.055 * opened, 0.04) * 0.7
    hidden = front + 0.015 - 0.06 * (1 - opened).clamp(min=0)
    inside = ellipsoid(x, middle, z - hidden, 0.78 * reach, 0.025 + 0.040 * opened, 0.04) * 0.7

    torso = ellipsoid(x, y + 0.94, z + 0.04, 0.66, 0.36, 0.34)
    collar = torus(length(x, z + 0.05), (y + 0.62) * 0.9, 0.19, 0.07)
    return [
        (SKIN, skin),
        (WHITE, white),
        (IRIS, iris),
        (PUPIL, pupil),
        (BROW, brows),
        (LIPS, lips),
        (MOUTH, inside),
        (GARMENT, torso),
        (COLLAR, collar),
    ]


def _hairline(p: Point) -> Tensor:
    """Signed distance to the half space of the scalp: above the forehead, and down to the neck behind."""
    return (0.62 * p[2] - p[1] + 0.22) * 0.85


def _cap(p: Point, half: Tensor, thick: float) -> Tensor:
    x, y, z = p
    return torch.maximum(ellipsoid(x, y - 0.26, z + 0.05, half + thick, 0.46 + thick, 0.45 + thick), _hairline(p))


def short(p: Point, half: Tensor) -> Tensor:
    return _cap(p, half, 0.045)


def curly(p: Point, half: Tensor) -> Tensor:
    x, y, z = p
    curls = 0.035 * wave(2.3 * x) * wave(2.3 * y + 0.2) * wave(2.3 * z)
    bush = ellipsoid(x, y - 0.32, z + 0.10, half + 0.19, 0.60, 0.55) * 0.8 + curls
    return torch.maximum(bush, _hairline(p) - 0.05)


def long(p: Point, half: Tensor) -> Tensor:
    x, y, z = p
    fall = torch.maximum(ellipsoid(x, y + 0.02, z + 0.14, half + 0.11, 0.74, 0.42), z - 0.16)
    return torch.minimum(_cap(p, half, 0.06), torch.maximum(fall, -0.66 - y))


def bun(p: Point, half: Tensor) -> Tensor:
    x, y, z = p
    return torch.minimum(_cap(p, half, 0.03), length(x, y - 0.80, z + 0.16) - 0.18)


def mohawk(p: Point, half: Tensor) -> Tensor:
    x, y, z = p
    return torch.maximum(slab(x.abs() - 0.075, length(y - 0.24, z + 0.06) - 0.66), _hairline(p) - 0.06)


def moustache(p: Point, chin: Tensor) -> Tensor:
    x, y, z = p
    return ellipsoid(x, y + 0.045 + 0.9 * x * x, z - _chin(x.clamp(-0.2, 0.2), -0.05, chin), 0.17, 0.036, 0.06) * 0.8


def goatee(p: Point, chin: Tensor) -> Tensor:
    x, y, z = p
    return ellipsoid(x, y + 0.33, z - 0.26, 0.10, 0.13, 0.11)


def full(p: Point, chin: Tensor) -> Tensor:
    x, y, z = p
    shell = ellipsoid(x, y + 0.10, z - 0.05, chin + 0.05, 0.37, 0.365)
    kept = torch.maximum(shell, y - 0.02 - 0.45 * x.abs() + 0.25 * (z - 0.36).clamp(min=0))
    lips = ellipsoid(x, y + 0.125, z - 0.40, 0.17, 0.075, 0.20)
    return torch.minimum(torch.maximum(kept, -lips), moustache(p, chin))


HAIR_STYLES: dict[str, Callable[[Point, Tensor], Tensor] | None] = {
    "bald": None,
    "short": short,
    "curly": curly,
    "long": long,
    "bun": bun,
    "mohawk": mohawk,
}
"""Hair style -> its distance function, of a point and the skull's half width."""

BEARDS: dict[str, Callable[[Point, Tensor], Tensor] | None] = {
    "none": None,
    "moustache": moustache,
    "goatee": goatee,
    "full": full,
}
"""Beard -> its distance function, of a point and the jaw's half width."""


@cache
def head(hair: str, beard: str) -> Callable[[Point, Proportions], Parts]:
    """The distance function of all people with a hair style and a beard."""
    scalp, chin_hair = HAIR_STYLES[hair], BEARDS[beard]

    def parts(p: Point, q: Proportions) -> Parts:
        found = _bare(p, q)
        if scalp is not None:
            found.append((HAIR, scalp(p, _skull_width(q[0]))))
        if chin_hair is not None:
            found.append((HAIR, chin_hair(p, 0.25 + 0.13 * q[1])))
        return found

    return parts


REACH = 1.35
"""Radius of a sphere around the origin that encloses head and shoulders."""


def anchors(face: Face, hair: str) -> Anchors:
    """Where things are worn."""
    half = 0.40 + 0.08 * face.width
    volume = {"bald": 0.0, "curly": 0.12}.get(hair, 0.05)
    return Anchors(-1.0, (0, 0.46, -0.05, half + volume), (0, -0.44, -0.05, 0.24), (0, 0.215, 0.47, 0.32))
