"""A training step of RealCustom: the diffusion loss alone, with a share of key features that differs by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from model import losses
from model.methods.base import AdapterOutput, DenoisingState
from model.methods.config import AdapterConfig
from model.objective import ObjectiveConfig, TrainingBatch, batch_text, check_batch, diffusion_losses
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
    """As `customcontrast.training_losses`, with `total` the diffusion loss; the losses that it lacks are 0.

    The encoder reads caption and latents as the UNet does, empty caption and noise included. A dropped image leaves the
    visual branch out.
    """
    check_objective(config, adapter_config.encoder)
    check_batch(batch, adapter_config, config)
    text = batch_text(None, batch, adapter_config, diffusion)
    scheduler: Any = diffusion.scheduler
    schedule = scheduler.alphas_cumprod
    noisy = losses.noisy_latents(batch.latents, batch.noise, schedule, batch.timesteps)
    alphas = schedule.to(batch.timesteps.device)[batch.timesteps]
    state = DenoisingState(text.hidden[:, 0], noisy, alphas, batch.key_ratio)
    out = adapter(batch.reference, batch.timesteps, state=state)
    return diffusion_only(diffusion_losses(out, batch, adapter_config, diffusion, config, text))


def diffusion_only(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts of `diffusion_losses` with the losses that were left out, and the total."""
    zero = parts["diffusion"].new_zeros(())
    return {**parts, "cscl": zero, "macl": zero, "location": zero, "total": parts["diffusion"]}


def check_objective(config: ObjectiveConfig, method: str) -> None:
    """Raise ModelError if a loss is on that the method does not have."""
    if config.cscl or config.macl or config.location_weight > 0:
        raise ModelError(
            f"{method} has neither contrastive losses nor a location loss; set train.objective.cscl and macl to false"
            " and location_weight to 0"
        )
