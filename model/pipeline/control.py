"""The ControlNets of a call: their inputs, and when and how strongly they act."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torch import Tensor

from model.pipeline.checks import check_numbers
from runtime.errors import ModelError, one_line


@dataclass(frozen=True)
class Control:
    """One or several ControlNets, each with an input, a scale and a span of the steps."""

    controlnet: Any
    images: list[Tensor]
    """For each ControlNet, [images, channels, height, width] in 0..1."""
    scales: list[float]
    spans: list[tuple[float, float]]
    """First and last part of the steps, 0..1."""
    guess: bool
    """With guidance, only the rows with a prompt read the ControlNets, whose deeper residuals count more."""
    steps: int

    def scales_at(self, step: int) -> list[float]:
        """Scale of each ControlNet at a step, 0 outside its span."""
        return [
            0.0 if step / self.steps < start or (step + 1) / self.steps > end else scale
            for scale, (start, end) in zip(self.scales, self.spans, strict=True)
        ]

    def inputs(self, rows: int) -> list[Tensor]:
        """For each ControlNet, its input for `rows`, a multiple of the images."""
        return [image.repeat(rows // len(image), 1, 1, 1) for image in self.images]

    def residuals(
        self, step: int, rows: Tensor, t: Tensor, text: Tensor, added: dict[str, Tensor] | None
    ) -> tuple[list[Tensor], Tensor]:
        """For the skip connections and the middle block, of `rows` [B, C, h, w] with plain captions [B, n, d]."""
        images: Any = self.inputs(len(rows))
        scales: Any = self.scales_at(step)
        if not is_multiple(self.controlnet):
            (images,), (scales,) = images, scales
        down, middle = self.controlnet(
            rows.to(self.controlnet.dtype),
            t,
            encoder_hidden_states=text,
            controlnet_cond=images,
            conditioning_scale=scales,
            guess_mode=self.guess,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return down, middle


def is_multiple(controlnet: Any) -> bool:
    """Whether this is diffusers' container of several ControlNets, compiled or not."""
    return isinstance(getattr(controlnet, "_orig_mod", controlnet), MultiControlNetModel)


def networks(controlnet: Any) -> list[Any]:
    """The ControlNets, one by one; none for None. Raises ModelError for one of another kind."""
    if controlnet is None:
        return []
    found = list(controlnet.nets) if is_multiple(controlnet) else [controlnet]
    for network in found:
        kind = type(getattr(network, "_orig_mod", network))
        if not issubclass(kind, ControlNetModel):
            raise ModelError(f"the ControlNet is a {kind.__name__}; give a ControlNetModel, or a list of them")
    return found


def read_images(controlnet: Any, image: Any, height: int | None, width: int | None, factor: int) -> list[Tensor]:
    """For each ControlNet, its input [1 or one per prompt, channels, height, width] in 0..1; none without a ControlNet.

    `image`: for several ControlNets a list, with one entry for each, or as in diffusers with one list for each prompt.
    `height`, `width` None: those of the image, rounded down to a multiple of `factor`.
    """
    nets = networks(controlnet)
    if bool(nets) != (image is not None):
        raise ModelError("a ControlNet and a control_image belong together; give both or neither")
    if not nets:
        return []
    given = [image]
    if is_multiple(controlnet):
        if not isinstance(image, list | tuple) or not image:
            raise ModelError(f"there are {len(nets)} ControlNets; give a list of as many control images")
        given = list(image)
        if any(isinstance(entry, list | tuple) for entry in given):
            if not all(isinstance(entry, list | tuple) and len(entry) == len(nets) for entry in given):
                raise ModelError(f"there are {len(nets)} ControlNets; give as many control images for each prompt")
            given = [list(of_each) for of_each in zip(*given, strict=True)]
        if len(given) != len(nets):
            raise ModelError(f"{len(given)} control images for {len(nets)} ControlNets; give one each")
    processor = VaeImageProcessor(vae_scale_factor=factor, do_convert_rgb=True, do_normalize=False)
    found: list[Tensor] = []
    for network, one in zip(nets, given, strict=True):
        try:
            pixels = processor.preprocess(one, height=height, width=width)
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"control_image cannot be read ({one_line(error)}); give PIL images") from error
        channels = network.config.conditioning_channels
        if pixels.shape[1] != channels:
            raise ModelError(
                f"control_image has {pixels.shape[1]} channels, but the ControlNet reads {channels}; give that many"
            )
        if (~torch.isfinite(pixels)).any() or pixels.max() > 1:
            raise ModelError("control_image has values that are not in 0..1; scale them, or give PIL images")
        if found and pixels.shape[-2:] != found[0].shape[-2:]:
            raise ModelError("the control images have different sizes; give height and width")
        found.append(pixels)
    return found


def read_control(
    controlnet: Any,
    pixels: Sequence[Tensor],
    counts: tuple[int, int, int],
    numbers: tuple[Any, Any, Any],
    guess: bool,
) -> Control | None:
    """The ControlNets with `pixels` of `read_images`; None without a ControlNet.

    `counts`: of prompts, images and steps. `numbers`: scale, start and end, each one for all ControlNets, or a list
    with one each. Raises ModelError for other numbers of them or of images, and unless 0 <= start < end <= 1.
    """
    prompts, images, steps = counts
    nets = networks(controlnet)
    count = max(1, len(nets))
    of_each: dict[str, list[Any]] = {}
    names = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
    for name, value in zip(names, numbers, strict=True):
        listed = list(value) if isinstance(value, list | tuple) else [value] * count
        if len(listed) != count:
            raise ModelError(f"{name} has {len(listed)} numbers for {len(nets)} ControlNets; give one for all, or each")
        for one in listed:
            check_numbers(whole={}, real={name: one})
        of_each[name] = listed
    scales, starts, ends = of_each.values()
    for first, last in zip(starts, ends, strict=True):
        if not 0 <= first < last <= 1:
            raise ModelError(
                f"control_guidance_start is {first} and control_guidance_end {last}; give parts of the steps, 0 <="
                " start < end <= 1"
            )
    for part in pixels:
        if len(part) not in (1, prompts):
            raise ModelError(f"{len(part)} control images for {prompts} prompts; give one, or one per prompt")
    if not nets:
        return None
    return Control(
        controlnet=controlnet,
        images=[part.to(controlnet.dtype).repeat_interleave(images // len(part), dim=0) for part in pixels],
        scales=scales,
        spans=list(zip(starts, ends, strict=True)),
        guess=guess or bool(nets[0].config.global_pool_conditions),
        steps=steps,
    )
