"""The methods whose pictures are made by the generate stage and scored side by side, each behind one small interface.

A method is a function from `MethodInputs` to a `Painter`. `METHODS` has those of this repository; another is named in
generate.methods as `package.module:function` (docs/evaluation.md has a whole one).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from eval.generate.params import GenerateParams
from model.adapter import DESCRIPTION, WEIGHTS, Adapter
from model.backbones.clip import load_clip
from model.backbones.diffusion import Diffusion, load_diffusion
from model.backbones.identity import weights_name
from model.backbones.variant import Variant
from model.pipeline.pipeline import build_pipeline
from runtime.digest import digest_files
from runtime.errors import UserError


class Painter(Protocol):
    """Draws pictures of one subject, or of several together."""

    def __call__(
        self, segments: Sequence[Image.Image], class_names: Sequence[str], prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        """Return a picture for each prompt and seed, `variant.resolution` px a side.

        Args:
            segments: of each subject shown, its reference photo: the subject alone on white.
            class_names: of each subject its class noun, which every prompt contains, in the order of `segments`.
            prompts: one for each picture.
            seeds: of each picture's starting noise, 0..2^32 - 1; the same for every method.
        """


@dataclass(frozen=True)
class MethodInputs:
    """What a method is loaded from."""

    params: GenerateParams
    variant: Variant
    """The frozen models; `variant.diffusion` is the base model, `variant.resolution` the side of a picture."""
    adapter: Path
    """Folder of the trained adapter; empty or missing before the train stage."""
    device: str
    """cpu, cuda or cuda:<index>."""


Load = Callable[[MethodInputs], Painter]


def base_weights(inputs: MethodInputs) -> dict[str, str]:
    """Return, by role, what names the weights of the base model."""
    return {"diffusion": weights_name(inputs.variant.diffusion)}


def all_weights(inputs: MethodInputs) -> dict[str, str]:
    """Return, by role, what names the weights of the base model, the image encoder and, where there is one, the
    adapter."""
    files = adapter_files(inputs.adapter)
    trained = {"adapter": f"adapter@{digest_files(*files)[:12]}"} if all(file.is_file() for file in files) else {}
    return base_weights(inputs) | {"image encoder": weights_name(inputs.variant.image_encoder)} | trained


def trained_weights(inputs: MethodInputs) -> dict[str, str]:
    """Return `all_weights`.

    Raises:
        UserError: there is no adapter.
    """
    named = all_weights(inputs)
    if "adapter" not in named:
        raise UserError(f"{inputs.adapter} holds no adapter ({DESCRIPTION} and {WEIGHTS}); run the train stage first")
    return named


def adapter_files(adapter: Path) -> list[Path]:
    """Return the files of an adapter's folder."""
    return [adapter / name for name in (DESCRIPTION, WEIGHTS)]


@dataclass(frozen=True)
class Method:
    """A method and what the stage wants to know of it; a plain function is one with the defaults."""

    load: Load
    weights: Callable[[MethodInputs], dict[str, str]] = all_weights
    """What names the weights it reads, by role: when they change, its pictures are made again."""
    pairs: bool = False
    """Whether it draws two subjects in one picture."""

    def __call__(self, inputs: MethodInputs) -> Painter:
        """Load it."""
        return self.load(inputs)

    def code(self) -> Path:
        """Return the file it is written in: when it changes, its pictures are made again."""
        load: Any = self.load
        while isinstance(load, partial):
            load = load.func
        return Path(inspect.getfile(load if inspect.isroutine(load) or inspect.isclass(load) else type(load)))


def customcontrast(inputs: MethodInputs) -> Painter:
    """Load the base model with the trained adapter."""
    diffusion = load_base(inputs)
    trained = Adapter.load(inputs.adapter, diffusion.name, diffusion.revision).to(inputs.device).eval()
    # One reference of each subject at a time, so one picture is the batch.
    encoder = load_clip(inputs.variant.image_encoder, inputs.device, batch_size=1)
    pipeline = build_pipeline(diffusion, trained, encoder)
    pipeline.set_progress_bar_config(disable=True)
    return painter(pipeline, inputs.params, inputs.variant.resolution)


def painter(pipeline: Callable[..., Any], params: GenerateParams, resolution: int) -> Painter:
    """Return a `CustomContrastPipeline` with the stage's settings, `resolution` px a side."""

    def paint(
        segments: Sequence[Image.Image], class_names: Sequence[str], prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        images: Any = pipeline(
            list(prompts),
            list(segments),
            tuple(class_names),
            height=resolution,
            width=resolution,
            num_inference_steps=params.steps,
            guidance_scale=params.guidance_scale,
            generator=noise(seeds),
            subject_strength=params.strength,
            location_masks=params.location_masks,
        ).images
        return list(images)

    return paint


def prompt_only(inputs: MethodInputs) -> Painter:
    """Load the base model alone, which is told the class noun and never sees the subject: the lower bound of similarity
    and, from the same noise, the controllability that a method starts from."""
    diffusion, params, side = load_base(inputs), inputs.params, inputs.variant.resolution
    pipeline = stock(diffusion)
    pipeline.set_progress_bar_config(disable=True)

    def paint(
        segments: Sequence[Image.Image], class_names: Sequence[str], prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        latents = pipeline(
            prompt=list(prompts),
            height=side,
            width=side,
            num_inference_steps=params.steps,
            guidance_scale=params.guidance_scale,
            generator=noise(seeds),
            output_type="latent",
        ).images
        # Decoded here, because the stock pipeline knows no VAE that stays float32 beside a float16 UNet.
        vae: Any = diffusion.vae
        with torch.no_grad():
            pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return pipeline.image_processor.postprocess(pixels, output_type="pil")

    return paint


def stock(diffusion: Diffusion) -> Any:
    """Return diffusers' own pipeline around the base model, with the scheduler that the adapter's pipeline uses."""
    parts: dict[str, Any] = {
        "vae": diffusion.vae,
        "text_encoder": diffusion.text_encoders[0],
        "tokenizer": diffusion.tokenizers[0],
        "unet": diffusion.unet,
        "scheduler": DDIMScheduler.from_config(diffusion.scheduler.config, clip_sample=False),
    }
    if len(diffusion.text_encoders) > 1:
        second = {"text_encoder_2": diffusion.text_encoders[1], "tokenizer_2": diffusion.tokenizers[1]}
        return StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def load_base(inputs: MethodInputs) -> Diffusion:
    """Return the frozen text-to-image model on the method's device."""
    return load_diffusion(inputs.variant.diffusion, getattr(torch, inputs.params.dtype), inputs.device)


def noise(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return where each picture's noise comes from: the CPU, so that a seed means the same picture on every device."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


METHODS: dict[str, Load] = {
    "customcontrast": Method(customcontrast, trained_weights, pairs=True),
    "prompt_only": Method(prompt_only, base_weights, pairs=True),
}


def find_method(name: str) -> Method:
    """Return the method of that name: a key of METHODS, or `package.module:function`.

    Raises:
        UserError: there is none.
    """
    module, colon, function = name.partition(":")
    if colon:
        try:
            found = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"generate.methods names '{name}', which cannot be imported ({error}); "
                f"write package.module:function, of a module on Python's path"
            ) from None
    elif name in METHODS:
        found = METHODS[name]
    else:
        raise UserError(
            f"generate.methods names '{name}'; it may hold {', '.join(METHODS)} and package.module:function of others"
        )
    return found if isinstance(found, Method) else Method(found)
