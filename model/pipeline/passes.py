"""UNet passes of a pipeline, with ControlNet residuals and SDXL's extra conditions."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from model.attention import CrossAttentionContext
from model.methods.base import Call
from model.pipeline.conditioning import SizeConditions
from model.pipeline.control import Control
from model.prompt import TextCondition
from model.unet import added_conditions, call_unet
from runtime.errors import ModelError


class UNetPasses:
    """Calls the UNet for one call of a pipeline."""

    def __init__(self, pipeline: Any, call: Call, sizes: SizeConditions, control: Control | None) -> None:
        self.unet, self.scheduler = pipeline.unet, pipeline.scheduler
        self.call, self.sizes, self.control = call, sizes, control
        self.step = 0
        """The current one; ControlNets act in some steps only."""
        self.guidance: Tensor | None = None
        if (width := self.unet.config.time_cond_proj_dim) is not None:
            scale = torch.tensor([call.guidance_scale - 1.0])
            self.guidance = StableDiffusionPipeline.get_guidance_scale_embedding(None, scale, width)
        self.pseudo_words = call.features is not None and pipeline.adapter.config.textual

    def __call__(self, latents: Tensor, t: Tensor, context: CrossAttentionContext, text: TextCondition) -> Tensor:
        """The prediction [rows, C, h, w] for rows of latents; `text` is their condition, with as many rows."""
        rows = self.model_input(latents, t)
        residuals = None if self.control is None else self.residuals(self.control, rows, t)
        guidance = None if self.guidance is None else self.guidance.to(latents).expand(len(rows), -1)
        return call_unet(self.unet, rows, t, context, self.added(text), residuals, guidance)

    def model_input(self, latents: Tensor, t: Tensor) -> Tensor:
        """The latents as the UNet reads them."""
        found: Tensor = self.scheduler.scale_model_input(latents, t)
        return found

    def alpha(self, t: Tensor) -> Tensor:
        """[1] cumulative product of the noise schedule at a timestep; a scheduler's broken ones are rounded."""
        schedule = getattr(self.scheduler, "alphas_cumprod", None)
        if schedule is None:
            raise ModelError(
                f"{type(self.scheduler).__name__} has no alphas_cumprod, by which the scores are fused; set another"
            )
        found: Tensor = schedule.to(t.device)[t.round().long().reshape(1)]
        return found

    def added(self, text: TextCondition) -> dict[str, Tensor] | None:
        """SDXL's extra conditions of these rows; None for SD 1.5."""
        return added_conditions(self.unet, text, self.sizes.rows(text.hidden.shape[0], self.call.images))

    def residuals(self, control: Control, rows: Tensor, t: Tensor) -> tuple[list[Tensor], Tensor]:
        """Residuals of the ControlNets, which read the plain prompts, for the skip connections and the middle block.
        Rows beyond the number of images belong to guidance's negative side."""
        text, negative = self.call.plain, self.call.negative
        if len(rows) > self.call.images and negative is not None and not control.guess:
            text = text.after(negative)
        seen = text.hidden.shape[0]
        down, middle = control.residuals(self.step, rows[-seen:], t, text.hidden[:, 0], self.added(text))
        if seen < len(rows):  # the unconditional rows, which guess mode leaves alone
            down = [torch.cat([torch.zeros_like(part), part]) for part in down]
            middle = torch.cat([torch.zeros_like(middle), middle])
        return down, middle
