"""One call of the UNet under a cross-attention context, with SDXL's extra conditions."""

from __future__ import annotations

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


def added_conditions(unet: Any, text: TextCondition, size: tuple[int, int]) -> dict[str, Tensor] | None:
    """SDXL's pooled text and size conditions (original size, crop corner 0 0, target size; pixels); None for SD 1.5."""
    if unet.config.addition_embed_type != "text_time":
        return None
    if text.pooled is None:
        raise ModelError("the UNet needs a pooled text embedding; use a base model with two text encoders")
    ids = torch.tensor([*size, 0, 0, *size], dtype=text.pooled.dtype, device=text.pooled.device)
    return {"text_embeds": text.pooled, "time_ids": ids.expand(text.pooled.shape[0], -1)}


def pixel_size(diffusion: Diffusion, latents: Tensor) -> tuple[int, int]:
    """Height and width in pixels of the images that `latents` decode to."""
    vae: Any = diffusion.vae
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return latents.shape[-2] * factor, latents.shape[-1] * factor
