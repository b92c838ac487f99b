"""The pipelines around tiny models, and diffusers' own with the same components."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, StableDiffusionXLPipeline

from model.pipeline import CustomContrastPipeline, build_pipeline
from tests.world.models import TinyDiffusion, make_adapter

KINDS = ["tiny_sd", "tiny_sdxl"]


def pipeline(diffusion: TinyDiffusion, image_encoder: Any = None, **sizes: Any) -> CustomContrastPipeline:
    built = build_pipeline(diffusion, make_adapter(diffusion, **sizes), image_encoder)
    built.set_progress_bar_config(disable=True)
    return built


def stock(diffusion: TinyDiffusion, ours: CustomContrastPipeline) -> Any:
    parts = {"vae": diffusion.vae, "unet": diffusion.unet, "scheduler": ours.scheduler}
    for index, name in enumerate(["", "_2"][: len(diffusion.text_encoders)]):
        parts |= {
            f"text_encoder{name}": diffusion.text_encoders[index],
            f"tokenizer{name}": diffusion.tokenizers[index],
        }
    if len(diffusion.text_encoders) > 1:
        built: Any = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        built = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    built.set_progress_bar_config(disable=True)
    return built


def draw(built: Any, prompt: Any, *args: Any, seed: int = 0, **settings: Any) -> torch.Tensor:
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "pt", **settings}
    return built(prompt, *args, generator=torch.Generator().manual_seed(seed), **settings).images


def controlnet(diffusion: TinyDiffusion, seed: int = 5) -> Any:
    torch.manual_seed(seed)
    made = ControlNetModel.from_unet(
        diffusion.unet, conditioning_channels=3, conditioning_embedding_out_channels=(4, 8)
    ).eval()
    for parameter in made.parameters():
        if not parameter.any():  # its outputs start from zero
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def controlled(diffusion: TinyDiffusion, controlnet: Any) -> tuple[Any, Any]:
    """(our pipeline, diffusers') with the same ControlNet, or list of them."""
    built = build_pipeline(diffusion, make_adapter(diffusion))
    xl = len(diffusion.text_encoders) > 1
    kind: Any = diffusers.StableDiffusionXLControlNetPipeline if xl else diffusers.StableDiffusionControlNetPipeline
    parts = {name: part for name, part in stock(diffusion, built).components.items() if part is not None}
    more = {"add_watermarker": False} if xl else {"safety_checker": None, "feature_extractor": None}
    loaded = kind(**{**parts, **more}, controlnet=controlnet)
    ours = type(built).from_pipe(loaded, make_adapter(diffusion))
    for one in (ours, loaded):
        one.set_progress_bar_config(disable=True)
    return ours, loaded


def edges(count: int, seed: int = 0, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def call_with_maps(maps: list[float | None]) -> Any:
    """A pipeline's call that hands on these maps of its steps, the last one again where a step has none of its own."""

    def call(callback_on_step_end: Any, callback_on_step_end_tensor_inputs: Any) -> None:
        location = None
        assert callback_on_step_end_tensor_inputs == ("location",)
        for step, found in enumerate(maps):
            location = location if found is None else torch.full((1, 1, 2, 3), found)
            assert callback_on_step_end(None, step, 900 - step, {"location": location}) == {}

    return call
