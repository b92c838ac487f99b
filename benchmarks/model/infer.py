"""Sampling with guidance: our pipeline, diffusers' IP-Adapter-plus and the stock pipeline on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Line, cost
from benchmarks.model.setting import (
    MASKED,
    ModelSetting,
    Way,
    build_adapter,
    hidden_states,
    ip_adapter_plus,
    latent_side,
    twin,
)
from model.dry.build import build_diffusion, frozen
from model.dry.memory import GB, MB, free_bytes, imagined, peak_bytes, weight_bytes
from model.dry.shapes import Shapes
from model.methods.guidance import RealCustomGuidance
from model.methods.registry import METHODS
from model.pipeline.pipeline import build_pipeline
from runtime.timing import turns

TERA = 1e12
STEPS = 25
"""Sampling steps of the counted calls of RealCustom and RealCustom++: those of the latter's scripts."""
PROMPT, NOUN = "a red mug on a table in the snow", "mug"


def infer(name: str, shapes: Shapes, setting: ModelSetting) -> Iterator[Line]:
    """FLOPs and time per sampling step, including S+ of all steps and captions, excluding decoding; peak memory."""
    ways = (("ours", ""), ("shared", f", text_every {setting.text_every}"))
    counted = operations(shapes, setting)
    for key, how in ways:
        for other in ("ip-adapter", "stock"):
            detail = f"{counted[key] / TERA:.4g} of {counted[other] / TERA:.4g} TFLOP/step"
            yield Line(f"{name} FLOP over {other}{how}", counted[key] / counted[other], most=True, detail=detail)
    yield from masked_lines(name, shapes, setting)
    if setting.operations:
        return
    needed, free = needed_bytes(shapes, setting), free_bytes(setting.device)
    if needed > free:
        yield too_large(name, needed, free)
        return
    works = {key: setting.waited(work) for key, work in samplers(shapes, setting).items()}
    peaks = {key: peak_bytes(work, setting.device) for key, work in works.items()}
    times = dict(zip(works, zip(*turns(list(works.values()), setting.repeats), strict=True), strict=True))
    for key, how in ways:
        yield cost(f"{name} over ip-adapter{how}", times[key], times["ip-adapter"], setting.steps, "step", 1.10)
        yield cost(f"{name} over stock{how}", times[key], times["stock"], setting.steps, "step", 1.20)
    for method in MASKED:
        yield cost(f"{name} {method} over stock", times[method], times["stock"], setting.steps, "step")
    for key in ("ip-adapter", "stock"):
        detail = f"peak {peaks['ours'] / MB:.1f} of {peaks[key] / MB:.1f} MB excluding the weights"
        yield Line(f"{name} memory over {key}", peaks["ours"] / peaks[key], most=True, detail=detail)


def operations(shapes: Shapes, setting: ModelSetting) -> dict[str, float]:
    """Floating point operations per sampling step of each way to sample; the mean over `text_every` steps.

    Counts matrix products, convolutions and attention on fake tensors: the relative times if every operation took
    equally long. Recording location maps is excluded, as timesteps have no values either.
    """
    found = {}
    brief = replace(setting, steps=setting.text_every, device=torch.device("cpu"))
    with imagined(), torch.no_grad():
        for key, work in samplers(shapes, brief).items():
            if key in MASKED:  # see masked_operations
                continue
            with FlopCounterMode(display=False) as counted:
                work()
            found[key] = counted.get_total_flops() / brief.steps
    return found


def masked_lines(name: str, shapes: Shapes, setting: ModelSetting) -> Iterator[Line]:
    """FLOPs of a call of RealCustom and RealCustom++ over those of the UNet rows that they cannot do without."""
    counted = masked_operations(shapes, setting)
    rows = {"realcustom": (3.0, "three UNet rows", 1.05), "realcustom_pp": (2.0, "two UNet rows", 1.30)}
    for method in MASKED:
        count, what, goal = rows[method]
        least = counted["row"] * count * STEPS
        detail = f"{counted[method] / TERA:.4g} of {least / TERA:.4g} TFLOP for {STEPS} steps, texts and tokens too"
        yield Line(f"{name} FLOP {method} over {what}", counted[method] / least, goal, most=True, detail=detail)


def masked_operations(shapes: Shapes, setting: ModelSetting) -> dict[str, float]:
    """Floating point operations of a call of `STEPS` steps of each of `MASKED`, and of one row of the plain UNet.

    A call costs what is done once, the image pass of each step, and the text pass of each step with a mask: three short
    calls tell these apart.
    """
    found: dict[str, float] = {}
    brief = replace(setting, device=torch.device("cpu"))
    with imagined(), torch.no_grad():
        ways = samplers(shapes, brief)

        def count(key: str, **settings: Any) -> int:
            with FlopCounterMode(display=False) as counted:
                ways[key](**settings)
            return counted.get_total_flops()

        def after(steps: int, masks: int) -> dict[str, Any]:
            return {"num_inference_steps": steps, "guidance": RealCustomGuidance(mask_steps=masks / steps)}

        for method in MASKED:
            one, second, alone = (count(method, **after(*numbers)) for numbers in ((1, 1), (2, 2), (2, 1)))
            guidance = METHODS[method].guidance or RealCustomGuidance()
            masks = round((guidance.mask_steps or 1.0) * STEPS)
            found[method] = float(one + (STEPS - 1) * (alone - one) + (masks - 1) * (second - alone))
        two = count("stock", num_inference_steps=2) - count("stock", num_inference_steps=1)
        found["row"] = two / (2 * setting.batch)
    return found


def samplers(shapes: Shapes, setting: ModelSetting) -> dict[str, Callable[..., Any]]:
    """The ways to sample the same number of latents: ours, ours with shared S+, the two others, and `MASKED`. They take
    further arguments of the pipeline."""
    diffusion = build_diffusion(shapes, setting.dtype, setting.device)
    ours = build_pipeline(diffusion, frozen(build_adapter(shapes, diffusion)))
    plain, plus = ours.to_stock(), ours.to_stock()
    plain.register_modules(unet=twin(diffusion.unet))
    plus.register_modules(unet=frozen(ip_adapter_plus(shapes, diffusion.unet)[0]))
    for pipeline in (ours, plain, plus):
        pipeline.set_progress_bar_config(disable=True)
    features = hidden_states(shapes, setting, 1)
    # Unconditional and conditional, [2, images, N, d]: accepted by diffusers in place of photos.
    embeds = torch.stack([torch.zeros_like(features[:, -1]), features[:, -1]])
    side = setting.side(shapes)
    common: dict[str, Any] = {
        "height": side,
        "width": side,
        "num_inference_steps": setting.steps,
        "guidance_scale": 7.5,
        "num_images_per_prompt": setting.batch,
        "output_type": "latent",
    }
    ways: dict[str, Callable[..., Any]] = {
        "ours": partial(ours, PROMPT, features, NOUN, **common),
        "shared": partial(ours, PROMPT, features, NOUN, text_every=setting.text_every, **common),
        "ip-adapter": partial(plus, PROMPT, ip_adapter_image_embeds=[embeds], **common),
        "stock": partial(plain, PROMPT, **common),
    }
    for method in MASKED:
        masked = build_pipeline(diffusion, frozen(build_adapter(shapes, diffusion, method)))
        masked.set_progress_bar_config(disable=True)
        masked.black = hidden_states(shapes, setting, 1, method)
        ways[method] = partial(masked, PROMPT, hidden_states(shapes, setting, 1, method), NOUN, **common)
    return ways


def needed_bytes(shapes: Shapes, setting: ModelSetting) -> int:
    """Approximate memory of `samplers`: all weights, and twice a plain UNet call with guidance, to cover adapters."""
    cpu = torch.device("cpu")
    with imagined(), torch.no_grad():
        diffusion = build_diffusion(shapes, setting.dtype, cpu)
        unet: Any = diffusion.unet
        trained = ip_adapter_plus(shapes, unet)[1]
        adapters = [build_adapter(shapes, diffusion, method) for method in get_args(Way)]
        modules: list[Any] = [diffusion.vae, unet, *diffusion.text_encoders, *adapters]
        weights = weight_bytes(trained) + sum(weight_bytes(module.parameters()) for module in modules)
        rows, side = 2 * setting.batch, latent_side(shapes, setting)
        latents = torch.zeros(rows, unet.config.in_channels, side, side, dtype=setting.dtype)
        text = torch.zeros(rows, shapes.texts[0]["max_position_embeddings"], unet.config.cross_attention_dim)
        added = None
        if len(shapes.texts) > 1:
            pooled = torch.zeros(rows, shapes.texts[-1]["projection_dim"], dtype=setting.dtype)
            added = {"text_embeds": pooled, "time_ids": torch.zeros(rows, 6)}
        call = twin(unet)
        peak = peak_bytes(lambda: call(latents, 0, text.to(setting.dtype), added_cond_kwargs=added), cpu)
    return weights + 2 * peak


def too_large(name: str, needed: int, free: int) -> Line:
    """The line of a part that is skipped."""
    detail = (
        f"GB are needed and {free / GB:.1f} are free, so it was skipped;"
        " use a larger machine, a smaller --size or --dtype bf16"
    )
    return Line(f"{name} does not fit", needed / GB, detail=detail)
