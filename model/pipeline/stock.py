"""The base model alone, by diffusers' own pipeline: images of prompts without a subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from model.backbones.diffusion import Diffusion
from model.backbones.frozen import fixed_batches


def stock_pipeline(diffusion: Diffusion) -> Any:
    """diffusers' own pipeline of the base model, with the scheduler of an adapter's pipeline."""
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


@dataclass(frozen=True)
class PromptSampler:
    """Samples prompts at one set of settings."""

    pipeline: Any
    """A stock pipeline."""
    side: int
    """Of an image, pixels."""
    steps: int
    guidance_scale: float
    batch_size: int | None
    """Images at once, where each is to be the same whatever others there are; None: all."""

    @classmethod
    def of(
        cls, diffusion: Diffusion, side: int, steps: int, guidance_scale: float, batch_size: int | None = None
    ) -> Self:
        """The sampler of a base model."""
        pipeline = stock_pipeline(diffusion)
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, side, steps, guidance_scale, batch_size)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """An image for each prompt and seed."""
        images: list[Image.Image] = []
        for batch, count in fixed_batches(list(zip(prompts, seeds, strict=True)), self.batch_size or len(prompts)):
            images += self.sample([prompt for prompt, _ in batch], [seed for _, seed in batch])[:count]
        return images

    @torch.no_grad()
    def sample(self, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        """One batch."""
        latents = self.pipeline(
            prompt=prompts,
            height=self.side,
            width=self.side,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=noise(seeds),
            output_type="latent",
        ).images
        # Decoded here: the stock pipeline does not support a float32 VAE beside a float16 UNet.
        vae = self.pipeline.vae
        pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        images: list[Image.Image] = self.pipeline.image_processor.postprocess(pixels, output_type="pil")
        return images


def noise(seeds: Sequence[int]) -> list[torch.Generator]:
    """Each image's noise generator, on the CPU so that a seed gives the same image on every device."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
