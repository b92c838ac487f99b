"""UNet passes of a pipeline, with ControlNet residuals and SDXL's extra conditions."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from model.attention import CrossAttentionContext
from model.methods.base import Call
from model.prompt import TextCondition
from model.unet import added_conditions, call_unet


class UNetPasses:
    """Calls the UNet for one call of a pipeline."""

    def __init__(
        self, pipeline: Any, call: Call, pixels: tuple[int, int], control: Tensor | None, control_scale: float
    ) -> None:
        """`pixels`: height and width of the images. `control`: the ControlNet's input, [images, 3, *pixels]."""
        self.unet, self.controlnet, self.scheduler = pipeline.unet, pipeline.controlnet, pipeline.scheduler
        self.call, self.pixels, self.control, self.control_scale = call, pixels, control, control_scale
        self.guidance: Tensor | None = None
        if (width := self.unet.config.time_cond_proj_dim) is not None:
            scale = torch.tensor([call.guidance_scale - 1.0])
            self.guidance = StableDiffusionPipeline.get_guidance_scale_embedding(None, scale, width)
        self.pseudo_words = call.features is not None and pipeline.adapter.config.textual

    def __call__(self, latents: Tensor, t: Tensor, context: CrossAttentionContext, text: TextCondition) -> Tensor:
        """The prediction [rows, C, h, w] for rows of latents; `text` is their condition, with as many rows."""
        rows = self.scheduler.scale_model_input(latents, t)
        added = added_conditions(self.unet, text, self.pixels)
        residuals = None if self.control is None else self.residuals(rows, t)
        guidance = None if self.guidance is None else self.guidance.to(latents).expand(len(rows), -1)
        return call_unet(self.unet, rows, t, context, added, residuals, guidance)

    def residuals(self, rows: Tensor, t: Tensor) -> tuple[list[Tensor], Tensor]:
        """Residuals of the ControlNet, which reads the plain prompts, for the skip connections and the middle block."""
        text = self.call.plain
        if self.call.guided and self.call.negative is not None:
            text = text.after(self.call.negative)
        down, middle = self.controlnet(
            rows.to(self.controlnet.dtype),
            t,
            encoder_hidden_states=text.hidden[:, 0],
            controlnet_cond=self.control_of(rows.shape[0]),
            conditioning_scale=self.control_scale,
            added_cond_kwargs=added_conditions(self.unet, text, self.pixels),
            return_dict=False,
        )
        return down, middle

    def control_of(self, rows: int) -> Tensor | None:
        """The ControlNet's input for `rows`, once or twice the images; None without a ControlNet."""
        return None if self.control is None else self.control.repeat(rows // self.call.images, 1, 1, 1)
