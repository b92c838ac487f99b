"""From training photos to the inputs of frozen encoders, and from targets to latents.

Shared, because the data stages do this once for all epochs, or training does it at each step.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.backbones.frozen import fixed_batches
from model.images.segment import on_white, place_on_white


def augmented(
    frame_id: str,
    image: Image.Image,
    mask: np.ndarray,
    index: int,
    *,
    single: bool,
    size: int,
    seed: int,
    margin: float,
    scale: tuple[float, float],
    rotation: float,
) -> Image.Image:
    """Augmentation `index` of the subject of a photo on white, the same on every call.

    0 is the plain segment with `margin`; the others are placed at random on `size` x `size` px, their longer side in
    `scale`. If the photo is its subject's `single` one, they are also flipped and rotated, by at most `rotation`
    degrees.
    """
    if index == 0:
        return on_white(image, mask, margin=margin)
    return place_on_white(
        image,
        mask,
        size,
        np.random.default_rng([seed, zlib.crc32(frame_id.encode()), index]),
        scale=scale,
        flip=single,
        rotation=rotation if single else 0.0,
    )


def encode_latents(vae: Any, images: Sequence[Image.Image], batch_size: int, device: str | torch.device) -> np.ndarray:
    """Latents [B, C, h, w] of square RGB images, by `latents_of` in batches."""
    rows = [
        latents_of(vae, torch.from_numpy(np.stack([np.asarray(image) for image in batch])).to(device))[:count].cpu()
        for batch, count in fixed_batches(images, batch_size)
    ]
    return torch.cat(rows).numpy()


@torch.no_grad()
def latents_of(vae: Any, images: Tensor) -> Tensor:
    """Scaled latents [B, C, h, w] float32 of images [B, H, W, 3] uint8 on the device of the `vae`.

    Means of the posterior, hence deterministic.
    """
    posterior = vae.encode(images.permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1.0).latent_dist
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return ((posterior.mean - shift) * vae.config.scaling_factor).float()


def shrink(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the subject's share of each latent cell, uint8 [height, width], 255 = all of it."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(grey.resize((width, height), Image.Resampling.BOX))
