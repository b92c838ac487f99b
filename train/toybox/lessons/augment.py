"""Augmentations that make networks robust to generated and compressed images."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train.toybox.lessons.boxes import boxes_of


def to_planes(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in 0..255."""
    return images.permute(0, 3, 1, 2).float().contiguous()


def degrade(images: Tensor, rng: np.random.Generator, share: float = 0.5) -> Tensor:
    """Blur, noise and brightness and contrast jitter, each on a random `share` of the images.

    images: uint8 [B, H, W, 3]. Returns float32 [B, 3, H, W] in 0..255.
    """
    x = to_planes(images)
    count, _, height, width = x.shape

    def strength(high: float, of: float = share) -> Tensor:
        chosen = rng.random(count) < of
        return torch.from_numpy((rng.random(count) * high * chosen).astype(np.float32))[:, None, None, None]

    small = F.interpolate(x, (height // 2, width // 2), mode="area")
    soft = F.interpolate(small, (height, width), mode="bilinear", align_corners=False)
    x = torch.lerp(x, soft, strength(1.0).expand_as(x))
    noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    x = x + noise * strength(16.0)
    gain = 1 + strength(0.5) - strength(0.4)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * gain + mean + strength(30.0) - strength(30.0)
    return x.clamp(0, 255)


def on_white(images: Tensor, masks: Tensor, rng: np.random.Generator | None, margin: float = 0.1) -> Tensor:
    """Subjects cut out on white and enlarged to fill a square, as in `model.images.segment.on_white`.

    images: uint8 [B, H, W, 3], masks: bool [B, H, W]. rng: jitters each square's position and scale; None: no jitter.
    margin: white border as a fraction of the box's longer side. Returns float32 [B, 3, H, W] in 0..255.
    """
    ink = (255 - to_planes(images)) * masks[:, None]
    boxes = torch.from_numpy(boxes_of(masks.numpy()))
    count, height, width = masks.shape
    side = (boxes[:, 2:] - boxes[:, :2]).amax(1).clamp(min=4) * (1 + 2 * margin)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    if rng is not None:
        side = side * torch.from_numpy(rng.uniform(0.9, 1.25, count).astype(np.float32))
        centre = centre + torch.from_numpy(rng.uniform(-0.06, 0.06, (count, 2)).astype(np.float32)) * side[:, None]
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = side / width, side / height
    theta[:, 0, 2], theta[:, 1, 2] = 2 * centre[:, 0] / width - 1, 2 * centre[:, 1] / height - 1
    grid = F.affine_grid(theta, [count, 3, height, width], align_corners=False)
    return 255 - F.grid_sample(ink, grid, align_corners=False)
