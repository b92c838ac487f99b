"""Image styles. A style is one function and one row of `STYLES`; it restyles a rendered photo."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.toybox.rendering.exact import Noise, blur, mix, shift, smooth, sqrt


@dataclass(frozen=True)
class StyledRender:
    """rgb [B, 3, H, W] in [0, 1]; alpha [B, H, W] of the subject with accessories; parts [B, H, W], 0 outside."""

    rgb: Tensor
    alpha: Tensor
    parts: Tensor
    noise: Noise


def luma(rgb: Tensor) -> Tensor:
    """[B, H, W] brightness."""
    return 0.30 * rgb[:, 0] + 0.59 * rgb[:, 1] + 0.11 * rgb[:, 2]


def _slope(x: Tensor) -> Tensor:
    """[B, H, W] absolute differences to the right and lower neighbours, the larger one."""
    return torch.maximum((x - shift(x, 0, 1)).abs(), (x - shift(x, 1, 0)).abs())


def outline(photo: StyledRender) -> Tensor:
    """[B, H, W] in [0, 1]: the subject's silhouette and the borders between its parts."""
    inner = ((photo.parts != shift(photo.parts, 0, 1)) | (photo.parts != shift(photo.parts, 1, 0))).float()
    return torch.maximum(smooth(_slope(photo.alpha), 0.10, 0.45), 0.7 * inner * (photo.alpha > 0.5))


def colour_edges(photo: StyledRender) -> Tensor:
    """[B, H, W] in [0, 1]: where the colour changes."""
    rgb = photo.rgb
    return smooth(
        torch.maximum(_slope(rgb[:, 0]), torch.maximum(_slope(rgb[:, 1]), _slope(rgb[:, 2]))),
        0.08,
        0.35,
    )


def plain_photo(photo: StyledRender) -> Tensor:
    return photo.rgb


def sketch(photo: StyledRender) -> Tensor:
    """Pencil on paper: dark outlines, hatching where the photo is dark."""
    grey, n = luma(photo.rgb), photo.noise.size
    at = torch.arange(n, device=grey.device)
    hatch = ((at[:, None] + at[None, :]) % 4 < 2).float()
    tone = smooth(grey, 0.55, 0.15) * hatch * 0.45 + smooth(grey, 0.9, 0.1) * 0.22
    lines = torch.maximum(outline(photo), 0.65 * colour_edges(photo) * (0.35 + 0.65 * photo.alpha))
    paper = 0.97 - 0.04 * photo.noise.grain(40) - tone * (0.45 + 0.55 * photo.alpha) - 0.85 * lines
    grey = paper.clamp(0.05, 1)
    return torch.stack([grey, grey * 0.99, grey * 0.96], 1)


def cartoon(photo: StyledRender) -> Tensor:
    """Flat saturated colours in a few steps, with a black outline."""
    rgb = mix(luma(photo.rgb)[:, None], photo.rgb, torch.full_like(photo.rgb, 1.35)).clamp(0, 1)
    flat = torch.floor(blur(rgb) * 4.0 + 0.5) / 4.0
    inside = torch.floor(rgb * 5.0 + 0.5) / 5.0
    flat = mix(flat, inside, photo.alpha[:, None])
    return flat * (1 - outline(photo))[:, None]


def neon(photo: StyledRender) -> Tensor:
    """Glowing outlines in the photo's colours on a dark ground."""
    rgb = photo.rgb
    top = torch.maximum(rgb[:, 0], torch.maximum(rgb[:, 1], rgb[:, 2]))[:, None]
    low = torch.minimum(rgb[:, 0], torch.minimum(rgb[:, 1], rgb[:, 2]))[:, None]
    vivid = ((rgb - 0.8 * low) / (top - 0.8 * low + 0.02)).clamp(0, 1)
    edges = torch.maximum(outline(photo), colour_edges(photo) * (0.25 + 0.75 * photo.alpha))
    light = vivid * edges[:, None]
    body = rgb * (0.06 + 0.42 * photo.alpha)[:, None]
    return body * 0.8 + light + 1.1 * blur(light, 2) + torch.tensor([0.02, 0.0, 0.05], device=rgb.device)[:, None, None]


def monochrome(photo: StyledRender) -> Tensor:
    grey = ((luma(photo.rgb) - 0.5) * 1.12 + 0.5)[:, None]
    return torch.cat([grey, grey, grey], 1)


def pixel_art(photo: StyledRender) -> Tensor:
    """Blocks of two by two pixels in few colours."""
    n = photo.rgb.shape[-1]
    even = torch.arange(n, device=photo.rgb.device) // 2 * 2
    odd = (even + 1).clamp(max=n - 1)
    rgb = photo.rgb
    mean = (rgb[..., even, :][..., even] + rgb[..., odd, :][..., odd]) * 0.5
    mean = mix(luma(mean)[:, None], mean, torch.full_like(mean, 1.25)).clamp(0, 1)
    line = torch.maximum(outline(photo)[:, even, :][..., even], outline(photo)[:, odd, :][..., odd])
    return torch.floor(mean * 5 + 0.5) / 5 * (1 - 0.8 * (line > 0.6).float())[:, None]


def watercolour(photo: StyledRender) -> Tensor:
    """Pale washes on white paper, darker where a wash dries at its border; the paper stays white in the corners."""
    wash = mix(blur(photo.rgb, 2), blur(photo.rgb), photo.alpha[:, None])
    wash = 1 - (1 - wash) * (0.62 + 0.35 * photo.noise.field(6))[:, None]
    rim = (colour_edges(photo) * 0.10 + outline(photo) * 0.22)[:, None]
    wash = wash * (1 - rim) + 0.03 * (photo.noise.grain(40) - 0.5)[:, None]
    n = photo.noise.size
    at = (torch.arange(n, device=wash.device) + 0.5) / n - 0.5
    far = sqrt(at[:, None] * at[:, None] + at[None, :] * at[None, :]) + 0.16 * (photo.noise.field(5) - 0.5)
    paper = smooth(far, 0.46, 0.60) * (1 - photo.alpha)
    return mix(wash, torch.ones_like(wash), paper[:, None])


@dataclass(frozen=True)
class Style:
    """draw(photo) returns [B, 3, H, W]. phrase: what captions put before the subject's noun phrase.

    coloured: whether the subject's colours can still be recognised.
    """

    draw: Callable[[StyledRender], Tensor]
    phrase: str
    coloured: bool = True


STYLES: dict[str, Style] = {
    "photo": Style(plain_photo, "a photo of"),
    "sketch": Style(sketch, "a sketch of", coloured=False),
    "cartoon": Style(cartoon, "a cartoon of"),
    "neon": Style(neon, "a neon picture of"),
    "monochrome": Style(monochrome, "a black and white photo of", coloured=False),
    "pixel": Style(pixel_art, "pixel art of"),
    "watercolour": Style(watercolour, "a watercolour of"),
}
