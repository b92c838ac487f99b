"""Step losses, as input of the training log."""

from __future__ import annotations

import torch

from train.logs.log import ACCURACIES, LOSSES, Measures

MEASURES = Measures(timesteps=1000, buckets=4)


def batch(rows: int = 8, seed: int = 0, **others: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Losses of `rows` samples and their timesteps, of which none is in the third bucket."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.rand((), generator=generator) for name in (*LOSSES, *ACCURACIES)}
    found["sample_diffusion"] = torch.rand(rows, generator=generator)
    timesteps = torch.tensor([0, 249, 250, 999, 750, 300, 10, 499])[:rows]
    return found | others, timesteps
