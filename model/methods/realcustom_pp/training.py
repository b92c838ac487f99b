"""A training step of RealCustom++: the diffusion loss, and a black image in place of a dropped one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    """As `realcustom.training_losses`; raises ModelError if an image is dropped and the batch has no black one."""
    check_objective(config, adapter_config.encoder)
    check_batch(batch, adapter_config, config)
    batch = with_black(batch)
    out = adapter(batch.reference, batch.timesteps)
    return diffusion_only(diffusion_losses(out, batch, adapter_config, diffusion, config))


def with_black(batch: TrainingBatch) -> TrainingBatch:
    """The batch with the black image as the reference of samples whose image is dropped; no image is dropped then."""
    if batch.black is None:
        if batch.drop_image.any():
            raise ModelError("realcustom_pp drops an image to black, but the batch has no features of a black image")
        return batch
    reference = torch.where(batch.drop_image[:, None, None, None], batch.black.to(batch.reference), batch.reference)
    return replace(batch, reference=reference, drop_image=torch.zeros_like(batch.drop_image))
