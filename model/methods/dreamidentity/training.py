"""A training step of DreamIdentity: the diffusion loss, and the mean squared length of the words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.methods.base import AdapterOutput
from model.methods.config import AdapterConfig
from model.methods.realcustom.training import check_objective, diffusion_only
from model.objective import ObjectiveConfig, TrainingBatch, check_batch, diffusion_losses
from runtime.errors import ModelError

if TYPE_CHECKING:
    from model.backbones.diffusion import Diffusion


def training_losses(
    batch: TrainingBatch,
    adapter: Callable[..., AdapterOutput],
    adapter_config: AdapterConfig,
    diffusion: Diffusion,
    config: ObjectiveConfig,
) -> dict[str, Tensor]:
    """`diffusion`, `regularisation` and their weighted sum `total`; the losses that the method lacks are 0.

    Raises ModelError if one of those is on.
    """
    check_objective(config, adapter_config.encoder)
    check_batch(batch, adapter_config, config)
    out = adapter(batch.reference, batch.timesteps)
    parts = diffusion_only(diffusion_losses(out, batch, adapter_config, diffusion, config))
    if out.mfi.s_plus is None:
        raise ModelError(f"{adapter_config.encoder} has nothing but its words, and the adapter made none")
    parts["regularisation"] = mean_squared_length(out.mfi.s_plus)
    parts["total"] = parts["diffusion"] + config.regularisation_weight * parts["regularisation"]
    return parts


def mean_squared_length(s_plus: Sequence[Tensor]) -> Tensor:
    """Mean of ||s_i||^2 over photos, words and text encoders, in float32, of S* [B, 1, k, d_text] per text encoder."""
    return torch.stack([s.float().square().sum(dim=-1).mean() for s in s_plus]).mean()
