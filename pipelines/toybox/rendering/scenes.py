"""Backgrounds. A scene is one function and one row of `SCENES`.

A function returns [B, 3, H, W] in sRGB for a `Stage`; all its randomness comes from the stage's noise, so that a scene
depends only on its seed and on nothing else in the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.toybox.rendering.exact import Noise, fract, mix, smooth, sqrt, wave

Rgb = tuple[float, float, float]
BLANK = "white"
"""The scene without any background: plain white, no shadow."""


@dataclass(frozen=True)
class Backdrop:
    """The canvas of a scene.

    u, v: [1, H, W], from 0 at the left or top to 1. horizon: [B, 1, 1], the v of the horizon. noise: one stream per
    image.
    """

    u: Tensor
    v: Tensor
    horizon: Tensor
    noise: Noise

    @property
    def depth(self) -> Tensor:
        """[B, H, W] in [0, 1] below the horizon: 0 at it, 1 at the lower border."""
        return ((self.v - self.horizon) / (1 - self.horizon)).clamp(0, 1)

    def below(self, offset: Tensor | float = 0.0) -> Tensor:
        """[B, H, W] coverage of the region below the horizon plus offset."""
        pixels = self.noise.size
        return ((self.v - self.horizon - offset) * pixels + 0.5).clamp(0, 1)

    def box(self, u0: Tensor, u1: Tensor, v0: Tensor, v1: Tensor) -> Tensor:
        """[B, H, W] coverage of a rectangle."""
        n = self.noise.size
        across = ((self.u - u0) * n + 0.5).clamp(0, 1) * ((u1 - self.u) * n + 0.5).clamp(0, 1)
        return across * ((self.v - v0) * n + 0.5).clamp(0, 1) * ((v1 - self.v) * n + 0.5).clamp(0, 1)

    def disc(self, u: Tensor, v: Tensor, radius: Tensor | float, soft: float = 1.0) -> Tensor:
        """[B, H, W] coverage of a disc whose border is `soft` pixels wide."""
        far = sqrt((self.u - u) * (self.u - u) + (self.v - v) * (self.v - v))
        return ((radius - far) * (self.noise.size / soft) + 0.5).clamp(0, 1)


def paint(*layers: tuple[Rgb | Tensor, Tensor] | Rgb | Tensor) -> Tensor:
    """Composite layers: the first is the ground, the others are (colour, coverage [B, H, W])."""
    ground, *rest = layers
    assert not isinstance(ground, tuple) or not isinstance(ground[0], tuple)
    shape = next(layer[1] for layer in rest if isinstance(layer, tuple) and isinstance(layer[1], Tensor))
    out = solid(ground, shape) if isinstance(ground, tuple) else ground  # type: ignore[arg-type]
    for colour, cover in rest:  # type: ignore[misc]
        out = mix(
            out,
            solid(colour, cover) if isinstance(colour, tuple) else colour,
            cover[:, None],
        )
    return out


def solid(colour: Rgb, like: Tensor) -> Tensor:
    """[1, 3, 1, 1] of one colour, on the device of `like`."""
    return torch.tensor(colour, dtype=like.dtype, device=like.device)[None, :, None, None]


def ramp(top: Rgb, bottom: Rgb, w: Tensor) -> Tensor:
    """[B, 3, H, W] from `top` where w [B, H, W] is 0 to `bottom` where it is 1."""
    return mix(solid(top, w), solid(bottom, w), w[:, None])


def tone(image: Tensor, field: Tensor, amount: float) -> Tensor:
    """image lightened and darkened by a field [B, H, W] in [0, 1]."""
    return image * (1 + amount * (field - 0.5))[:, None]


def beach(s: Backdrop) -> Tensor:
    shore = s.horizon + s.noise.number(0.12, 0.20)
    line = shore + 0.04 * (s.noise.field(1, 4) - 0.5)
    sky = ramp((0.36, 0.68, 0.96), (0.80, 0.92, 1.0), (s.v / (s.horizon + 0.01)).clamp(0, 1))
    cloud = smooth(s.noise.field(6, 3), 0.62, 0.85) * 0.9
    sea = ramp(
        (0.05, 0.38, 0.68),
        (0.20, 0.72, 0.78),
        ((s.v - s.horizon) / (shore - s.horizon)).clamp(0, 1),
    )
    sea = tone(sea, s.noise.field(24, 5), 0.25)
    sand = tone(ramp((0.90, 0.80, 0.56), (0.97, 0.88, 0.66), s.depth), s.noise.field(14), 0.14)
    sand = tone(sand, s.noise.grain(40), 0.08)
    n = s.noise.size
    foam = (1 - ((s.v - line).abs() * 36)).clamp(0, 1)
    return paint(
        sky,
        ((1.0, 1.0, 1.0), cloud),
        (sea, s.below()),
        (sand, ((s.v - line) * n).clamp(0, 1)),
        ((1.0, 1.0, 1.0), foam),
    )


def snow(s: Backdrop) -> Tensor:
    hills = s.horizon - 0.10 + 0.16 * (s.noise.field(1, 3) - 0.5)
    sky = ramp((0.62, 0.74, 0.88), (0.84, 0.90, 0.96), (s.v / (s.horizon + 0.01)).clamp(0, 1))
    far = tone(ramp((0.78, 0.85, 0.94), (0.86, 0.92, 0.98), s.v / 0.5), s.noise.field(6), 0.08)
    ground = tone(ramp((0.90, 0.94, 0.99), (0.97, 0.98, 1.0), s.depth), s.noise.field(7, 4), 0.10)
    n = s.noise.size
    out = paint(sky, (far, ((s.v - hills) * n).clamp(0, 1)), (ground, s.below()))
    for _ in range(3):
        u, v = s.noise.number(), s.horizon - s.noise.number(-0.02, 0.05)
        tall = s.noise.number(0.14, 0.22)
        half = (s.v - v + tall) * 0.38
        tree = ((half - (s.u - u).abs()) * n).clamp(0, 1) * ((v - s.v) * n).clamp(0, 1)
        out = paint(out, ((0.16, 0.34, 0.32), tree * (half > 0)))
    flakes = (s.noise.grain(40) > 0.975).float() * 0.9
    return paint(out, ((1.0, 1.0, 1.0), flakes))


def grass(s: Backdrop) -> Tensor:
    sky = ramp((0.45, 0.74, 0.98), (0.82, 0.93, 1.0), (s.v / (s.horizon + 0.01)).clamp(0, 1))
    cloud = smooth(s.noise.field(5, 3), 0.55, 0.8)
    field = ramp((0.44, 0.72, 0.24), (0.22, 0.56, 0.13), s.depth)
    field = tone(tone(field, s.noise.field(9, 30), 0.45), s.noise.grain(40), 0.22)
    flowers = (s.noise.grain(37) > 0.988).float() * (s.depth > 0.15)
    return paint(sky, ((1.0, 1.0, 1.0), cloud), (field, s.below()), ((1.0, 0.95, 0.35), flowers))


def brick(s: Backdrop) -> Tensor:
    rows = torch.floor(s.noise.number(7, 10))
    y = s.v * rows + s.noise.number()
    row = torch.floor(y)
    x = s.u * (rows * 0.5) + fract(row * 0.5) + s.noise.number()
    n = float(s.noise.size)
    joint = (
        torch.minimum(
            (0.5 - (fract(y) - 0.5).abs()) / rows,
            (0.5 - (fract(x) - 0.5).abs()) / (rows * 0.5),
        )
        * n
    )
    shade = fract(torch.floor(x) * 0.61803 + row * 0.3819 + 0.17 * torch.floor(x) * row)
    wall = tone(ramp((0.66, 0.27, 0.19), (0.74, 0.36, 0.25), s.noise.field(3)), shade, 0.35)
    wall = paint(
        tone(wall, s.noise.grain(40), 0.12),
        ((0.80, 0.74, 0.68), (1.25 - joint).clamp(0, 1)),
    )
    path = tone(ramp((0.48, 0.46, 0.45), (0.62, 0.60, 0.58), s.depth), s.noise.grain(40), 0.12)
    return paint(wall, (path, s.below(0.28)))


def night(s: Backdrop) -> Tensor:
    sky = ramp((0.05, 0.07, 0.22), (0.16, 0.20, 0.42), (s.v / (s.horizon + 0.01)).clamp(0, 1))
    stars = (s.noise.grain(40) > 0.965).float() * (0.4 + 0.6 * s.noise.grain(39))
    u, v = s.noise.number(0.1, 0.9), s.noise.number(0.06, 0.14)
    moon, bite = s.disc(u, v, 0.075), s.disc(u + 0.035, v - 0.015, 0.065)
    ground = tone(ramp((0.15, 0.19, 0.35), (0.30, 0.36, 0.54), s.depth), s.noise.field(8), 0.3)
    return paint(
        sky,
        ((1.0, 1.0, 0.9), stars),
        ((1.0, 0.97, 0.75), moon * (1 - bite)),
        (ground, s.below()),
    )


def desert(s: Backdrop) -> Tensor:
    sky = ramp((0.42, 0.70, 0.92), (0.98, 0.90, 0.72), (s.v / (s.horizon + 0.01)).clamp(0, 1))
    sun = s.disc(s.noise.number(0.1, 0.9), s.horizon * 0.35, 0.06, 2.0)
    dune = s.horizon - 0.02 + 0.20 * (s.noise.field(1, 3) - 0.5)
    n = s.noise.size
    far = ramp((0.80, 0.50, 0.26), (0.88, 0.60, 0.32), s.v * 2)
    ripple = wave(s.depth * s.depth * 5 + 3 * s.depth + 0.5 * s.noise.field(3))
    sand = tone(ramp((0.90, 0.62, 0.32), (0.96, 0.72, 0.40), s.depth), ripple, 0.07)
    out = paint(
        sky,
        ((1.0, 0.98, 0.85), sun),
        (far, ((s.v - dune) * n).clamp(0, 1)),
        (sand, s.below()),
    )
    u, base = s.noise.number(0.03, 0.97), s.horizon + 0.05
    stem = s.box(u - 0.025, u + 0.025, base - 0.24, base) + s.box(u - 0.09, u + 0.09, base - 0.13, base - 0.09)
    arms = s.box(u - 0.09, u - 0.055, base - 0.19, base - 0.10) + s.box(u + 0.055, u + 0.09, base - 0.22, base - 0.10)
    return paint(out, ((0.20, 0.48, 0.24), (stem + arms).clamp(0, 1)))


def water(s: Backdrop) -> Tensor:
    sea = ramp((0.16, 0.66, 0.82), (0.02, 0.24, 0.50), s.v + 0 * s.horizon)
    lean = s.u + 0.45 * s.v * (s.noise.number() - 0.5) * 2
    rays = smooth(wave(lean * s.noise.number(2.5, 4.0) + s.noise.number()), 0.2, 1.0) * (1 - s.v).clamp(0, 1) * 0.45
    floor_ = tone(ramp((0.10, 0.40, 0.52), (0.42, 0.66, 0.60), s.depth), s.noise.field(10), 0.3)
    out = paint(sea, ((0.75, 0.98, 1.0), rays), (floor_, smooth(s.depth + 0 * s.v, 0.35, 0.7)))
    for _ in range(6):
        u, v, r = (
            s.noise.number(),
            s.noise.number(0.02, 0.9),
            s.noise.number(0.02, 0.045),
        )
        out = paint(
            out,
            (
                (0.85, 1.0, 1.0),
                (s.disc(u, v, r) - 0.75 * s.disc(u, v, r - 0.016)).clamp(0, 1),
            ),
        )
    return out


def forest(s: Backdrop) -> Tensor:
    leaves = tone(
        ramp((0.10, 0.30, 0.12), (0.34, 0.52, 0.20), s.noise.field(7)),
        s.noise.grain(40),
        0.3,
    )
    out = paint(leaves, ((0.62, 0.74, 0.40), smooth(s.noise.field(5), 0.70, 0.95) * 0.7))
    for i in range(7):
        u, half = (i + s.noise.number(0.1, 0.9)) / 7, s.noise.number(0.016, 0.045)
        trunk = s.box(u - half, u + half, 0 * u - 1, s.horizon + s.noise.number(0.0, 0.10))
        out = paint(
            out,
            (
                ramp((0.20, 0.13, 0.08), (0.42, 0.29, 0.18), (s.u - u) / half * 0.5 + 0.5),
                trunk,
            ),
        )
    ground = tone(
        ramp((0.22, 0.25, 0.10), (0.40, 0.34, 0.17), s.depth),
        s.noise.field(16, 12),
        0.5,
    )
    ground = tone(ground, s.noise.grain(40), 0.3)
    return paint(ground, (out, 1 - s.below(0.02)))


def city(s: Backdrop) -> Tensor:
    out = (
        ramp(
            (0.58, 0.72, 0.88),
            (0.90, 0.92, 0.93),
            (s.v / (s.horizon + 0.1)).clamp(0, 1),
        )
        + 0 * s.horizon[:, None]
    )
    ground_line = s.horizon + 0.08
    left = s.noise.number(-0.10, 0.0)
    n = float(s.noise.size)
    for _ in range(7):
        wide, top = s.noise.number(0.12, 0.22), s.horizon - s.noise.number(0.06, 0.40)
        grey = s.noise.number(0.32, 0.68)
        body = s.box(left, left + wide - 0.012, top, ground_line)
        pane = (fract((s.u - left) * (n / 5)) > 0.45) & (fract((s.v - top) * (n / 5)) > 0.45)
        inside = s.box(left + 0.02, left + wide - 0.03, top + 0.03, ground_line - 0.03) > 0.5
        lit = (grey > 0.5).float()
        wall = torch.stack([grey * 0.95 + 0 * body, grey * 0.97 + 0 * body, grey * 1.08 + 0 * body], 1)
        out = paint(out, (wall, body))
        out = paint(
            out,
            ((0.98, 0.92, 0.60), (pane & inside) * (1 - lit)),
            ((0.18, 0.24, 0.36), (pane & inside) * lit),
        )
        left = left + wide
    road = tone(ramp((0.36, 0.37, 0.40), (0.27, 0.28, 0.31), s.depth), s.noise.grain(40), 0.14)
    out = paint(out, (road, s.below(0.08)))
    dash = (fract(s.u * 3 + s.noise.number()) < 0.55) * (((s.v - ground_line - 0.10).abs() * n) < 1.0)
    return paint(out, ((0.95, 0.93, 0.85), dash.float()))


def table(s: Backdrop) -> Tensor:
    hue = s.noise.number()[:, None]
    wall = mix(solid((0.86, 0.80, 0.70), s.v), solid((0.62, 0.74, 0.76), s.v), hue) + 0 * s.v[:, None]
    wall = tone(wall, s.noise.field(2), 0.14)
    across = (s.u - 0.5) / (0.35 + s.depth) * 3.2 + s.noise.number()
    plank = fract(torch.floor(across) * 0.61803 + s.noise.number())
    wood = tone(ramp((0.62, 0.38, 0.19), (0.76, 0.50, 0.27), s.depth), plank, 0.22)
    wood = tone(wood, s.noise.field(5, 30), 0.20)
    seam = (0.5 - (fract(across) - 0.5).abs()) * (0.35 + s.depth) * (s.noise.size / 3.2)
    wood = paint(wood, ((0.30, 0.16, 0.07), (0.9 - seam).clamp(0, 1)))
    edge = (1 - (s.v - s.horizon - 0.10).abs() * 40).clamp(0, 1)
    return paint(wall, (wood, s.below(0.10)), ((0.36, 0.20, 0.10), edge * 0.7))


def sunset(s: Backdrop) -> Tensor:
    w = (s.v / (s.horizon + 0.05)).clamp(0, 1)
    low = s.horizon + 0.05
    sky = torch.where(
        (w < 0.5)[:, None],
        ramp((0.30, 0.14, 0.42), (0.88, 0.30, 0.36), w * 2),
        ramp((0.88, 0.30, 0.36), (1.0, 0.76, 0.28), w * 2 - 1),
    )
    u = s.noise.number(0.12, 0.88)
    glow, sun = s.disc(u, low - 0.03, 0.22, 20.0), s.disc(u, low - 0.03, 0.10)
    streak = smooth(s.noise.field(14, 2), 0.55, 0.85) * 0.5
    sea = tone(ramp((0.80, 0.38, 0.30), (0.24, 0.12, 0.30), s.depth), s.noise.field(26, 5), 0.4)
    path = (1 - (s.u - u).abs() * 9).clamp(0, 1) * smooth(s.noise.field(28, 6), 0.3, 0.8) * (1 - s.depth)
    return paint(
        sky,
        ((0.98, 0.50, 0.50), streak),
        ((1.0, 0.85, 0.45), glow * 0.5),
        ((1.0, 0.95, 0.70), sun),
        (sea, s.below(0.05)),
        ((1.0, 0.80, 0.45), path * s.below(0.05)),
    )


def studio(s: Backdrop) -> Tensor:
    a, b = s.noise.number()[:, None], s.noise.number(0.72, 0.86)[:, None]
    third = torch.tensor([0.0, 1 / 3, 2 / 3], device=s.v.device)[None, :, None, None]
    tint = b + 0.10 * wave(a + third)
    wall = tint * (1.08 - 0.35 * s.v)[:, None]
    floor_ = tint * (0.82 + 0.25 * s.depth)[:, None]
    spot = s.disc(s.noise.number(0.3, 0.7), s.horizon * 0.7, 0.35, 40.0)
    out = mix(wall, floor_, smooth(s.v - s.horizon, -0.02, 0.22)[:, None])
    return out + 0.10 * spot[:, None]


def white(s: Backdrop) -> Tensor:
    return solid((1.0, 1.0, 1.0), s.v) + 0 * (s.v + s.horizon)[:, None]


@dataclass(frozen=True)
class Scene:
    """A background and its effect on the subject.

    phrase: its name in captions. shadow: strength of the shadow on the ground (0: none). key, ambient: colours of the
    key light and the ambient light. haze, veil: colour and opacity of the haze between subject and camera.
    """

    paint: Callable[[Backdrop], Tensor]
    phrase: str
    shadow: float = 0.55
    key: Rgb = (1.0, 0.97, 0.92)
    ambient: Rgb = (0.95, 0.98, 1.05)
    haze: Rgb = (1.0, 1.0, 1.0)
    veil: float = 0.0


SCENES: dict[str, Scene] = {
    "beach": Scene(beach, "on the beach"),
    "snow": Scene(snow, "in the snow", shadow=0.35, ambient=(1.0, 1.04, 1.12)),
    "grass": Scene(grass, "on the grass"),
    "brick": Scene(brick, "in front of a brick wall"),
    "night": Scene(
        night,
        "at night",
        key=(0.75, 0.80, 1.0),
        ambient=(0.82, 0.88, 1.10),
        haze=(0.3, 0.4, 0.8),
        veil=0.06,
    ),
    "desert": Scene(desert, "in the desert", key=(1.08, 0.98, 0.84)),
    "water": Scene(
        water,
        "under water",
        shadow=0.3,
        key=(0.85, 1.0, 1.05),
        haze=(0.10, 0.55, 0.70),
        veil=0.14,
    ),
    "forest": Scene(forest, "in the forest", key=(0.95, 1.0, 0.84), ambient=(0.90, 1.02, 0.90)),
    "city": Scene(city, "in the city"),
    "table": Scene(table, "on a wooden table"),
    "sunset": Scene(sunset, "at sunset", key=(1.15, 0.85, 0.62), ambient=(1.0, 0.86, 0.95)),
    "studio": Scene(studio, "in a studio", shadow=0.45),
    BLANK: Scene(white, "on a white background", shadow=0.0),
}
