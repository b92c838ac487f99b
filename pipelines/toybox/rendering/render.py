"""Images of an embedded world: sphere-traced subjects in front of procedural scenes, with exact masks, in torch only.

The same shot gives the same bytes in any batch (see `exact`); on a GPU the bytes may differ by rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipelines.toybox.rendering import exact
from pipelines.toybox.rendering.accessories import ACCESSORIES, REACH, Accessory, fit
from pipelines.toybox.rendering.exact import Noise, mix
from pipelines.toybox.rendering.march import FOCAL, Rays, Trace, View, rays, trace
from pipelines.toybox.rendering.scenes import BLANK, SCENES, Backdrop
from pipelines.toybox.rendering.sdf import BODY, TRIM, WORN, Anchors, Parts, Point, nearest, union
from pipelines.toybox.rendering.styles import STYLES, StyledRender
from pipelines.toybox.rendering.surface import PATTERNS

Rgb = tuple[float, float, float]
CHUNK = 192
"""Images rendered at once; keeps the working set in the CPU cache and bounds memory."""


@dataclass(frozen=True)
class Texture:
    """A pattern of `PATTERNS` on a form's body, in `colour` (sRGB in [0, 1]); scale, phase in [0, 1); waist: where it
    begins, see `surface.Pattern`."""

    pattern: str
    colour: Rgb
    scale: float
    phase: float
    waist: float


@dataclass(frozen=True)
class Form:
    """A subject's body, in the subject's own frame (see `sdf`).

    kind: forms of one kind have the same distance function and are traced together. numbers: what `parts` gets as `q`.
    palette: part id -> sRGB in [0, 1]. fitted: whether the body shrinks to stay inside the unit sphere with what it
    wears. grounded: whether it stands on the ground and darkens it. reach: radius of a sphere around the origin that
    encloses the body.
    """

    kind: str
    parts: Callable[[Point, Any], Parts]
    numbers: tuple[float, ...]
    anchors: Anchors
    palette: Mapping[int, Rgb]
    texture: Texture | None = None
    fitted: bool = True
    grounded: bool = True
    reach: float = 1.0


@dataclass(frozen=True)
class RenderItem:
    """An image to render. accessory: a row of `wardrobe`, or None. seed: of the scene's own variation."""

    form: Form
    view: View
    scene: str
    style: str = "photo"
    accessory: str | None = None
    seed: int = 0
    wardrobe: Mapping[str, Accessory] = field(default_factory=lambda: ACCESSORIES)

    @property
    def worn(self) -> Accessory | None:
        return self.wardrobe[self.accessory] if self.accessory else None

    def placed(self) -> tuple[float, float]:
        """Scale and height of the form's frame in the world."""
        return fit(self.worn, self.form.anchors) if self.form.fitted and self.worn else (1.0, 0.0)


@dataclass(frozen=True)
class Rendered:
    """A batch of images.

    images: uint8 [B, H, W, 3], sRGB. masks: bool [B, H, W], the subject with all it wears. subject_masks: bool
    [B, H, W], the visible subject alone. parts: uint8 [B, H, W], part ids of `sdf`, 0 outside the mask. depth: float32
    [B, H, W], z in the camera's frame at the subject's surface (enclosing sphere's radius = 1), 0 outside the mask.
    """

    images: Tensor
    masks: Tensor
    subject_masks: Tensor
    parts: Tensor
    depth: Tensor


def render_shots(shots: Sequence[RenderItem], size: int = 64, device: torch.device | str = "cpu") -> Rendered:
    """Render every shot as an image of size x size pixels."""
    order = sorted(range(len(shots)), key=lambda i: (shots[i].form.kind, shots[i].scene, i))
    chunks = [order[i : i + CHUNK] for i in range(0, len(order), CHUNK)]
    with torch.no_grad():
        done = [_render_chunk([shots[i] for i in chunk], size, device) for chunk in chunks]
    place = torch.tensor(order).argsort().to(device)
    return Rendered(*(torch.cat([d[k] for d in done])[place] for k in range(5)))


def _groups(keys: Sequence[str | None]) -> Iterator[tuple[str, list[int]]]:
    for key in sorted({k for k in keys if k is not None}):
        yield key, [i for i, k in enumerate(keys) if k == key]


@dataclass(frozen=True)
class _Solid:
    """An object to trace: its parts in its own frame, and per image the placement of that frame in the subject's world.

    rows: indices of the images it is in. centre: three tensors [n, 1, 1], scale [n, 1, 1], reach: radius of the
    enclosing sphere in its own frame. q: the form's numbers, tensors [n].
    """

    parts: Callable[[Point, Any], Parts]
    rows: list[int]
    centre: tuple[Tensor, Tensor, Tensor]
    scale: Tensor
    reach: float
    q: tuple[Tensor, ...]

    def local(self, p: Point, image: Tensor) -> tuple[Point, tuple[Tensor, ...], Tensor]:
        """World points [N] in the solid's own frame, with the proportions and scale [N] of their images."""
        s = self.scale.reshape(-1)[image]
        x, y, z = ((a - c.reshape(-1)[image]) / s for a, c in zip(p, self.centre, strict=True))
        return (x, y, z), tuple(q[image] for q in self.q), s

    def distance(self, p: Point, q: tuple[Tensor, ...]) -> Tensor:
        """Distance [N] of points of its own frame."""
        return union(self.parts(p, q))

    def trace(self, lines: Rays) -> Trace:
        """Intersections with the rays of its images, given in world coordinates; lengths are in world units."""
        x, y, z = ((o - c) / self.scale for o, c in zip(lines.origin, self.centre, strict=True))
        found = trace(Rays((x, y, z), lines.direction, lines.slope), self.reach, self.distance, self.q)
        return Trace(found.gap * self.scale, found.t * self.scale)

    def normal(self, p: Point, q: tuple[Tensor, ...], step: float = 0.012) -> Point:
        """The outward unit normal at points of its own frame, by finite differences over a tetrahedron's corners."""
        nx, ny, nz = (torch.zeros_like(a) for a in p)
        for i, j, k in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
            d = self.distance((p[0] + i * step, p[1] + j * step, p[2] + k * step), q)
            nx, ny, nz = nx + d * i, ny + d * j, nz + d * k
        return exact.normalize(nx, ny, nz)


def _column(values: Sequence[float], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _solids(shots: list[RenderItem], device: torch.device | str) -> Iterator[_Solid]:
    """The bodies, one per kind in the chunk, then the accessories, one per kind."""
    for _, rows in _groups([shot.form.kind for shot in shots]):
        forms, places = [shots[i].form for i in rows], [shots[i].placed() for i in rows]
        zero = _column([0.0] * len(rows), device)
        q = tuple(_column(list(values), device)[:, 0, 0] for values in zip(*(f.numbers for f in forms), strict=True))
        centre = (zero, _column([height for _, height in places], device), zero)
        scales = _column([scale for scale, _ in places], device)
        yield _Solid(forms[0].parts, rows, centre, scales, forms[0].reach, q)
    for name, rows in _groups([shot.accessory for shot in shots]):
        row, spots = shots[rows[0]].wardrobe[name], []
        for i in rows:
            x, y, z, radius = getattr(shots[i].form.anchors, row.anchor)
            scale, height = shots[i].placed()
            spots.append((x * scale, y * scale + height, z * scale, radius * scale))
        x, y, z, r = (_column([spot[k] for spot in spots], device) for k in range(4))
        yield _Solid(lambda p, q, row=row: row.parts(p), rows, (x, y, z), r, REACH, ())  # type: ignore[misc]


@dataclass(frozen=True)
class _Layer:
    """One solid seen in its images: alpha, t, parts [n, H, W] and colour [n, 3, H, W]."""

    rows: list[int]
    alpha: Tensor
    t: Tensor
    parts: Tensor
    rgb: Tensor


def _coverage(lines: Rays, found: Trace, size: int) -> Tensor:
    """Fraction of each pixel that the solid covers: 1 inside, at least 1/2 if the ray through its centre hits.

    Outside the outline it follows from the gap in pixels; just inside, from the largest gap among the four neighbours,
    which is at most one pixel more than its own.
    """
    pixels = found.gap / (found.t * lines.slope) * (FOCAL * size)
    outside = (0.5 - pixels).clamp(0, 0.499)
    beside = torch.zeros_like(pixels)
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        beside = torch.maximum(beside, exact.shift(pixels, dy, dx))
    inside = (1.5 - beside).clamp(0.5, 1)
    return torch.where(found.gap > 0, outside, inside)


def _shade(
    solid: _Solid,
    shots: list[RenderItem],
    lines: Rays,
    found: Trace,
    alpha: Tensor,
    size: int,
) -> _Layer:
    """Colours and part ids where alpha > 0."""
    n, h, w = alpha.shape
    device = alpha.device
    slot = (alpha > 0).reshape(-1).nonzero()[:, 0]
    image = slot // (h * w)
    t = found.t.reshape(-1)[slot]
    d = tuple(e.reshape(-1)[slot] for e in lines.direction)
    p: Point = tuple(o.reshape(-1)[image] + t * e for o, e in zip(lines.origin, d, strict=True))  # type: ignore[assignment]
    own, q, scale = solid.local(p, image)
    part = nearest(solid.parts(own, q))
    pixel = t / (FOCAL * size) / scale
    base = _albedo([shots[i] for i in solid.rows], own, part, image, pixel)
    nx, ny, nz = solid.normal(own, q)
    open_ = union(solid.parts((own[0] + 0.14 * nx, own[1] + 0.14 * ny, own[2] + 0.14 * nz), q)) / 0.14
    shade = (0.45 + 0.55 * open_).clamp(0.35, 1)

    scenes = [SCENES[shots[i].scene] for i in solid.rows]
    angles = torch.tensor([shots[i].view.light for i in solid.rows], dtype=torch.float32, device=device) / 360
    cosine = exact.wave(angles[:, 1] + 0.25)
    light = (
        exact.wave(angles[:, 0]) * cosine,
        exact.wave(angles[:, 1]),
        exact.wave(angles[:, 0] + 0.25) * cosine,
    )
    lx, ly, lz = (v[image] for v in light)
    key = torch.tensor([s.key for s in scenes], device=device)[image]
    ambient = torch.tensor([s.ambient for s in scenes], device=device)[image]
    facing = nx * lx + ny * ly + nz * lz
    lambert = (facing * 0.85 + 0.15).clamp(min=0)
    hx, hy, hz = exact.normalize(lx - d[0], ly - d[1], lz - d[2])
    gloss = (nx * hx + ny * hy + nz * hz).clamp(min=0)
    for _ in range(5):
        gloss = gloss * gloss
    graze = 1 + nx * d[0] + ny * d[1] + nz * d[2]
    rim = (graze * graze * graze).clamp(0, 1) * (0.6 + 0.4 * ny)
    soft = ((0.50 + 0.15 * ny) * shade)[:, None] * ambient
    rgb = base * (soft + (0.52 * lambert * shade)[:, None] * key)
    rgb = rgb + (0.22 * gloss * (facing > 0))[:, None] * key + (0.18 * rim)[:, None] * ambient
    veil = torch.tensor([s.veil for s in scenes], device=device)[image][:, None]
    rgb = mix(rgb, torch.tensor([s.haze for s in scenes], device=device)[image], veil)

    flat = torch.zeros(n * h * w, 3, device=device)
    flat[slot] = rgb
    parts = torch.zeros(n * h * w, dtype=torch.uint8, device=device)
    parts[slot] = part.to(torch.uint8)
    planes = flat.reshape(n, h, w, 3).permute(0, 3, 1, 2)
    return _Layer(solid.rows, alpha, found.t, parts.reshape(n, h, w), planes)


BLACK = (0.0, 0.0, 0.0)


def _albedo(shots: list[RenderItem], own: Point, part: Tensor, image: Tensor, pixel: Tensor) -> Tensor:
    """Surface colours [N, 3] at points of the solid's own frame."""
    device = part.device
    last = max(TRIM, *(max(shot.form.palette) for shot in shots))
    worn = [shot.worn for shot in shots]
    colours = [
        dict(shot.form.palette) | ({WORN: row.colour, TRIM: row.trim} if row else {})
        for shot, row in zip(shots, worn, strict=True)
    ]
    palette = torch.tensor([[row.get(part, BLACK) for part in range(last + 1)] for row in colours], device=device)
    colour = palette[image, part]
    textures = [shot.form.texture for shot in shots]
    if not any(textures):
        return colour
    plain = Texture("plain", BLACK, 0.0, 0.0, 0.0)
    second, scale, phase, waist = (
        torch.tensor([getattr(texture or plain, name) for texture in textures], device=device)
        for name in ("colour", "scale", "phase", "waist")
    )
    share = torch.zeros_like(pixel)
    for name, rows in _groups([texture.pattern if texture else None for texture in textures]):
        chosen = torch.zeros(len(shots), dtype=torch.bool, device=device)
        chosen[rows] = True
        at = (chosen[image] & (part == BODY)).nonzero()[:, 0]
        i = image[at]
        x, y, z = own
        share[at] = PATTERNS[name].paint((x[at], y[at] - waist[i], z[at]), scale[i], phase[i], pixel[at])
    return mix(colour, second[image], share[:, None])


def _backgrounds(shots: list[RenderItem], size: int, device: torch.device | str) -> Tensor:
    """The scenes' backgrounds [B, 3, H, W]."""
    out = torch.empty(len(shots), 3, size, size, device=device)
    at = (torch.arange(size, device=device) + 0.5) / size
    for name, rows in _groups([shot.scene for shot in shots]):
        noise = Noise([shots[i].seed for i in rows], size, device)
        level = _column([0.40 - 0.006 * (shots[i].view.elevation - 20) for i in rows], device)
        horizon = (level + noise.number(-0.06, 0.06)).clamp(0.16, 0.48)
        stage = Backdrop(
            at[None, None, :].expand(1, size, size),
            at[None, :, None].expand(1, size, size),
            horizon,
            noise,
        )
        out[rows] = SCENES[name].paint(stage)
    return out


def _shadows(shots: list[RenderItem], solids: list[_Solid], lines: Rays) -> Tensor:
    """Fraction of light lost on the ground [B, H, W]: a contact shadow and a soft cast shadow."""
    b, h, w = lines.direction[0].shape
    device = lines.slope.device
    shadow = torch.zeros(b, h, w, device=device)
    for solid in solids:
        rows = [i for i in solid.rows if shots[i].scene != BLANK and shots[i].form.grounded]
        if not rows:
            continue
        inner = torch.tensor([solid.rows.index(i) for i in rows], device=device)
        base = []
        for i in rows:
            shrink, height = shots[i].placed()
            base.append(shots[i].form.anchors.base * shrink + height)
        ground = _column(base, device)
        ox, oy, oz = (o[rows] for o in lines.origin)
        dx, dy, dz = (d[rows] for d in lines.direction)
        t = (ground - oy) / torch.minimum(dy, torch.full_like(dy, -1e-4))
        gx, gz = ox + t * dx, oz + t * dz
        slot = ((dy < -1e-3) & (gx * gx + gz * gz < 5.0)).reshape(-1).nonzero()[:, 0]
        image = slot // (h * w)
        gx, gz, gy = (
            gx.reshape(-1)[slot],
            gz.reshape(-1)[slot],
            ground.reshape(-1)[image] + 0.02,
        )
        turn = torch.tensor([shots[i].view.light for i in rows], dtype=torch.float32, device=device) / 360
        flat = exact.wave(turn[:, 1] + 0.25)
        lx, ly, lz = (
            exact.wave(turn[:, 0]) * flat,
            exact.wave(turn[:, 1]),
            exact.wave(turn[:, 0] + 0.25) * flat,
        )
        (x, y, z), q, scale = solid.local((gx, gy, gz), inner[image])
        lx, ly, lz = (v[image] / scale for v in (lx, ly, lz))
        lit = (solid.distance((x, y, z), q) * scale / 0.30).clamp(0, 1)
        for far in (0.22, 0.5, 0.85, 1.25):
            gap = solid.distance((x + far * lx, y + far * ly, z + far * lz), q) * scale
            lit = torch.minimum(lit, (0.55 + gap / (0.34 * far)).clamp(0, 1))
        part = torch.zeros(len(rows) * h * w, device=device)
        part[slot] = 1 - lit
        shadow[rows] = torch.maximum(shadow[rows], part.reshape(len(rows), h, w))
    return shadow


def _render_chunk(shots: list[RenderItem], size: int, device: torch.device | str) -> tuple[Tensor, ...]:
    """Render one chunk: images, masks, subject masks, parts, depth as in `Rendered`."""
    lines = rays([shot.view for shot in shots], size, device)
    solids = list(_solids(shots, device))
    rgb = _backgrounds(shots, size, device)
    strength = _column([SCENES[shot.scene].shadow for shot in shots], device)
    rgb = rgb * (1 - strength * _shadows(shots, solids, lines))[:, None]

    alpha = torch.zeros(len(shots), size, size, device=device)
    parts = torch.zeros(len(shots), size, size, dtype=torch.uint8, device=device)
    near = torch.full_like(alpha, 1e3)
    for solid in solids:
        own = Rays(
            tuple(o[solid.rows] for o in lines.origin),  # type: ignore[arg-type]
            tuple(d[solid.rows] for d in lines.direction),  # type: ignore[arg-type]
            lines.slope,
        )
        found = solid.trace(own)
        layer = _shade(solid, shots, own, found, _coverage(own, found, size), size)
        rows = layer.rows
        front = layer.t < near[rows]
        cover = torch.where(front, layer.alpha, layer.alpha * (1 - alpha[rows]))
        rgb[rows] = mix(rgb[rows], layer.rgb, cover[:, None])
        hit = layer.alpha >= 0.5
        takes = hit & front
        parts[rows] = torch.where(takes, layer.parts, parts[rows])
        near[rows] = torch.where(takes, layer.t, near[rows])
        alpha[rows] = torch.maximum(alpha[rows], layer.alpha)

    mask = alpha >= 0.5
    rgb = rgb.clamp(0, 1)
    for name, rows in _groups([shot.style if shot.style != "photo" else None for shot in shots]):
        noise = Noise([shots[i].seed + 1 for i in rows], size, device)
        rgb[rows] = STYLES[name].draw(StyledRender(rgb[rows], alpha[rows], parts[rows], noise)).clamp(0, 1)
    images = torch.floor(rgb * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    depth = torch.where(mask, near * lines.slope, torch.zeros_like(near))
    return images, mask, mask & (parts < WORN), parts, depth
