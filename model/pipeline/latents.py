"""Sizes, steps and noise of a call, and the way back from latents to images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from model.pipeline.checks import check_noise, check_schedule
from runtime.errors import ModelError, one_line


class LatentSpace:
    """A pipeline's latents, as its UNet, VAE and scheduler want them."""

    unet: Any
    vae: Any
    scheduler: Any
    image_processor: Any
    vae_scale_factor: int
    """Pixels of a latent's side."""
    text_encoder_count: int

    def image_size(self, height: int | None, width: int | None, control: Sequence[Tensor]) -> tuple[int, int]:
        """Height and width of the images: as given, else of the `control` images, else the UNet's native size. Raises
        ModelError if they do not fit the VAE."""
        native: Any = self.unet.config.sample_size
        native = (native, native) if isinstance(native, int) else native
        default = control[0].shape[-2:] if control else [side * self.vae_scale_factor for side in native]
        height, width = height or default[0], width or default[1]
        if height % self.vae_scale_factor or width % self.vae_scale_factor:
            raise ModelError(
                f"size {width}x{height} is not a multiple of {self.vae_scale_factor} pixels; choose one that is"
            )
        return height, width

    def prepare_timesteps(self, count: int, timesteps: Any, sigmas: Any, device: torch.device) -> Tensor:
        """The scheduler's timesteps: `count` of them, or those that are given. Raises ModelError if it refuses."""
        check_schedule(self.scheduler, count, timesteps, sigmas)
        try:
            found, _ = retrieve_timesteps(self.scheduler, count, device, timesteps, sigmas)
        except ValueError as error:
            raise ModelError(f"the scheduler refuses these timesteps ({one_line(error)}); give others") from error
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # else a scheduler whose first timesteps are equal starts at the second
        return found

    def prepare_latents(
        self,
        images: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        """Initial noise [images, C, h, w] at the scheduler's scale."""
        shape = (
            images,
            self.unet.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        check_noise(generator, latents, shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device) * self.scheduler.init_noise_sigma

    def decode(self, latents: Tensor, output_type: str) -> Any:
        """Latents -> images as `output_type`."""
        if output_type == "latent":
            return latents
        dtype = self.vae.dtype
        xl = self.text_encoder_count > 1  # diffusers treats SDXL's VAEs otherwise
        overflows = xl and dtype == torch.float16 and self.vae.config.force_upcast
        if overflows:
            self.vae.to(torch.float32)
        latents, config = latents.to(self.vae.dtype), self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if xl and mean is not None and std is not None:
            mean, std = (torch.tensor(part).view(1, -1, 1, 1).to(latents) for part in (mean, std))
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        pixels = self.vae.decode(latents, return_dict=False)[0]
        if overflows:
            self.vae.to(dtype)
        return self.image_processor.postprocess(pixels, output_type=output_type)
