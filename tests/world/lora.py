"""A random LoRA, saved and loaded as diffusers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from diffusers.utils import convert_state_dict_to_diffusers

from model.pipeline import CustomContrastPipeline
from tests.world.models import TinyDiffusion

UNET, TEXT = ["to_q", "to_v"], ["q_proj", "v_proj"]


def saved_lora(model: Any, targets: list[str]) -> dict[str, torch.Tensor]:
    """The weights of a random LoRA, as diffusers saves them; `model` is left as it was."""
    torch.manual_seed(3)
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights="gaussian"), "made")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    found = peft.get_peft_model_state_dict(model, adapter_name="made")
    if hasattr(model, "delete_adapters"):
        model.delete_adapters("made")
    else:
        model.delete_adapter("made")
    return dict(convert_state_dict_to_diffusers(found))


def load_lora(ours: CustomContrastPipeline, diffusion: TinyDiffusion, folder: Path, name: str) -> None:
    """Load a LoRA of the UNet and all text encoders."""
    layers = {"unet_lora_layers": saved_lora(diffusion.unet, UNET)}
    for suffix, encoder in zip(("", "_2"), diffusion.text_encoders, strict=False):
        layers[f"text_encoder{suffix}_lora_layers"] = saved_lora(encoder, TEXT)
    type(ours).save_lora_weights(folder, **layers)
    ours.load_lora_weights(folder, adapter_name=name)
