"""One call of the UNet under a cross-attention context, with SDXL's extra conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.attention import CrossAttentionContext
from model.prompt import TextCondition
from runtime.errors import ModelError

if TYPE_CHECKING:
    from model.backbones.diffusion import Diffusion


def call_unet(
    unet: Any,
    latents: Tensor,
    timesteps: Tensor,
    context: CrossAttentionContext,
    added: dict[str, Tensor] | None,
    residuals: tuple[list[Tensor], Tensor] | None = None,
    guidance: Tensor | None = None,
) -> Tensor:
    """The UNet's prediction [B, C, h, w] under `context`; `added` are SDXL's extra conditions, `residuals` a
    ControlNet's, for the skip connections and the middle block, `guidance` the embedded guidance scale of a UNet that
    was distilled with it."""
    down, middle = residuals or (None, None)
    return unet(
        latents.to(unet.dtype),
        timesteps,
        timestep_cond=guidance,
        encoder_hidden_states=context.text[:, 0],
        added_cond_kwargs=added,
        cross_attention_kwargs={"conditioning": context},
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
        return_dict=False,
    )[0]


def added_conditions(unet: Any, text: TextCondition, sizes: Sequence[Sequence[int]]) -> dict[str, Tensor] | None:
    """SDXL's pooled text and size conditions; None for SD 1.5.

    `sizes`: for each row six numbers in pixels: original height and width, top and left of the crop, target height and
    width.
    """
    if unet.config.addition_embed_type != "text_time":
        return None
    if text.pooled is None:
        raise ModelError("the UNet needs a pooled text embedding; use a base model with two text encoders")
    ids = torch.tensor(sizes, dtype=text.pooled.dtype, device=text.pooled.device)
    return {"text_embeds": text.pooled, "time_ids": ids}


def uncropped(diffusion: Diffusion, latents: Tensor) -> list[tuple[int, ...]]:
    """SDXL's size conditions of images that are neither scaled nor cropped, of the size that `latents` decode to."""
    vae: Any = diffusion.vae
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = latents.shape[-2] * factor, latents.shape[-1] * factor
    return [(height, width, 0, 0, height, width)] * len(latents)
