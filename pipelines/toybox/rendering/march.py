"""Camera rays and sphere tracing.

Sphere tracing (Hart, 1996) advances each ray by the distance to the nearest surface. The smallest distance along the
way, in pixels, is also how far outside the outline a ray passes; this antialiases the outline.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.toybox.rendering.exact import sqrt

FOCAL = 1.7
"""Focal length as a multiple of the image's side (a field of view of about 33 degrees)."""

STEPS = 48
HIT, STRIDE = 0.001, 0.005
"""A ray has hit when it is nearer than HIT to a surface; no step is shorter than STRIDE, so that grazing rays make
progress. In units of the enclosing sphere's radius: a pixel is about 0.04 wide at a size of 64."""


@dataclass(frozen=True)
class View:
    """A pinhole camera on a sphere around the subject.

    azimuth (0 looks at the front, +z; 90 is at +x), elevation and roll in degrees. size: diameter of the sphere
    that encloses the subject, as a fraction of the image. position: offset of its centre from the image's, as fractions
    of the image, right and down. light: azimuth and elevation of the light source, in degrees.
    """

    azimuth: float
    elevation: float
    roll: float = 0.0
    size: float = 0.85
    position: tuple[float, float] = (0.0, 0.0)
    light: tuple[float, float] = (-35.0, 50.0)


def camera(view: View, size: int = 64) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """World to camera rotation R [3, 3], translation t [3] and intrinsics K [3, 3] (pixels) of a view.

    The world is the subject's frame: y up, the enclosing sphere has radius 1. The camera's axes are COLMAP's: x
    right, y down, z forward; pixel centres at half-integers. A point p projects to K (R p + t). The camera looks
    straight at the subject unless `position` moves it sideways; K is the same for all views.
    """
    az, el, roll = np.radians([view.azimuth, view.elevation, view.roll])
    back = np.array([np.sin(az) * np.cos(el), np.sin(el), np.cos(az) * np.cos(el)])
    right = np.array([np.cos(az), 0.0, -np.sin(az)])
    down = np.cross(-back, right)
    c, s = np.cos(roll), np.sin(roll)
    rotation = np.stack([c * right + s * down, c * down - s * right, -back])
    distance = np.sqrt(1 + (2 * FOCAL / view.size) ** 2)
    x, y = view.position
    translation = np.array([x / FOCAL * distance, y / FOCAL * distance, distance])
    k = np.array([[FOCAL * size, 0, size / 2], [0, FOCAL * size, size / 2], [0, 0, 1.0]])
    return rotation, translation, k


@dataclass(frozen=True)
class Rays:
    """One ray per pixel. origin: three tensors [B, 1, 1]; direction: three tensors [B, H, W] of unit length.

    slope [H, W]: depth gained per unit length of ray, so that a pixel is `depth / focal` wide.
    """

    origin: tuple[Tensor, Tensor, Tensor]
    direction: tuple[Tensor, Tensor, Tensor]
    slope: Tensor


def rays(views: list[View], size: int, device: torch.device | str) -> Rays:
    """The rays through all pixel centres of the views, in the subject's frame."""
    poses = [camera(view, size) for view in views]
    r = torch.from_numpy(np.stack([pose[0] for pose in poses]).astype(np.float32)).to(device)[:, :, :, None, None]
    centres = np.stack([-pose[0].T @ pose[1] for pose in poses]).astype(np.float32)
    o = torch.from_numpy(centres).to(device)[:, :, None, None]
    at = (torch.arange(size, device=device) + 0.5 - size / 2) / (FOCAL * size)
    u, v = at[None, :].expand(size, size), at[:, None].expand(size, size)
    far = sqrt(u * u + v * v + 1)
    a, b = u / far, v / far
    c = 1 / far
    d = [r[:, 0, i] * a + r[:, 1, i] * b + r[:, 2, i] * c for i in range(3)]
    return Rays((o[:, 0], o[:, 1], o[:, 2]), (d[0], d[1], d[2]), c)


@dataclass(frozen=True)
class Trace:
    """Nearest approach of every ray. gap [B, H, W]: smallest distance (0: hit, large: never near); t: its position
    along the ray."""

    gap: Tensor
    t: Tensor


FAR = 1e3


def trace(
    lines: Rays,
    reach: float,
    distance: Callable[[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]], Tensor],
    q: tuple[Tensor, ...],
) -> Trace:
    """March the rays that enter the sphere of radius `reach` around the origin.

    distance(points, proportions) -> [N]; q: the images' proportions, tensors [B], passed to it per ray.
    """
    b, h, w = lines.direction[0].shape
    (ox, oy, oz), (dx, dy, dz) = lines.origin, lines.direction
    middle = -(ox * dx + oy * dy + oz * dz)
    inside = reach * reach - (ox * ox + oy * oy + oz * oz - middle * middle)
    slot = (inside > 0).reshape(-1).nonzero()[:, 0]
    gap, where = torch.full_like(dx, FAR).reshape(-1), middle.reshape(-1).clone()
    half = sqrt(inside.reshape(-1)[slot])
    middle = where[slot]
    t, end = middle - half, middle + half
    image = slot // (h * w)
    origin = [o.reshape(-1)[image] for o in lines.origin]
    direction = [d.reshape(-1)[slot] for d in lines.direction]
    own = [value[image] for value in q]
    best, at = torch.full_like(t, FAR), t
    for step in range(STEPS):
        x, y, z = (o + t * e for o, e in zip(origin, direction, strict=True))
        d = distance((x, y, z), tuple(own))
        nearer = (d < best) & (best > HIT)
        best, at = torch.where(nearer, d, best), torch.where(nearer, t + d.clamp(max=0), at)
        t = t + d.clamp(min=STRIDE)
        if step % 4 == 3 or step == STEPS - 1:
            gap[slot], where[slot] = best, at
            keep = ((best > HIT) & (t < end)).nonzero()[:, 0]
            if not len(keep):
                break
            slot, t, end, best, at = (value[keep] for value in (slot, t, end, best, at))
            origin, direction, own = ([value[keep] for value in values] for values in (origin, direction, own))
    gap = torch.where(gap <= HIT, torch.zeros_like(gap), gap)
    return Trace(gap.reshape(b, h, w), where.reshape(b, h, w))
