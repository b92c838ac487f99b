"""A training step: ours from cached latents and features, IP-Adapter-plus's as published, and a plain UNet's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Line, cost
from benchmarks.model.infer import NOUN, PROMPT, TERA, too_large
from benchmarks.model.setting import (
    MASKED,
    Checkpointing,
    ModelSetting,
    Way,
    build_adapter,
    build_vision,
    hidden_states,
    ip_adapter_plus,
    latent_side,
    twin,
)
from model import losses
from model.backbones.diffusion import Diffusion
from model.dry.build import build_diffusion
from model.dry.memory import GB, MB, LiveTensors, free_bytes, imagined, peak_bytes, saved_bytes, weight_bytes
from model.dry.shapes import Shapes
from model.methods.registry import method_of
from model.objective import ObjectiveConfig, TrainingBatch
from model.prompt import TextCondition, checkpoint_text, encode_captions
from model.unet import added_conditions, uncropped
from runtime.timing import turns

CARD = 24.0
"""GB of the graphics card a training step should fit on."""


@dataclass(frozen=True)
class Step:
    """The parts of a training step."""

    loss: Callable[[], Tensor]
    modules: list[nn.Module]
    """All modules involved, including frozen ones."""
    optimizer: torch.optim.Optimizer | None
    """None if nothing is trained."""

    @classmethod
    def of(cls, loss: Callable[[], Tensor], modules: list[Any]) -> Step:
        """The step that minimises `loss` with AdamW, as in both trainers."""
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        return cls(loss, modules, torch.optim.AdamW(trained, lr=3e-5, weight_decay=1e-2) if trained else None)

    def both_ways(self) -> None:
        """Forward and backward; gradients accumulate."""
        self.loss().backward()

    def __call__(self) -> None:
        """One update of the weights."""
        self.both_ways()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


Maker = Callable[[Shapes, ModelSetting, Diffusion], Step]


@dataclass(frozen=True)
class Weight:
    """Bytes of a step, counted on fake tensors."""

    frozen: int
    trained: int
    """Weights and AdamW's state: two float32 moments, and in half precision a float32 copy."""
    moving: int
    """Peak of activations and gradients."""
    saved: int
    """Saved for backward."""

    @classmethod
    def of(cls, make: Maker, shapes: Shapes, setting: ModelSetting) -> Weight:
        """The weight of the step that `make` builds."""
        cpu = torch.device("cpu")
        setting = replace(setting, device=cpu, compile=False)  # fake tensors cannot be compiled
        with imagined():
            step = make(shapes, setting, build_diffusion(shapes, setting.dtype, cpu))
            found: list[Tensor] = []
            with LiveTensors() as live:
                saved = saved_bytes(lambda: found.append(step.loss()), step.modules)
                found.pop().backward()
        parameters = [p for module in step.modules for p in module.parameters()]
        state = 8 if setting.dtype == torch.float32 else 12
        trained = sum(p.numel() * (p.element_size() + state) for p in parameters if p.requires_grad)
        return cls(weight_bytes(p for p in parameters if not p.requires_grad), trained, live.peak, saved)

    @property
    def total(self) -> int:
        """All of it."""
        return self.frozen + self.trained + self.moving


def train(name: str, shapes: Shapes, setting: ModelSetting) -> Iterator[Line]:
    """FLOPs, time and memory of a training step, the effect of the options, and its memory on a 24 GB card."""
    own, *others = (operations(make, shapes, setting) for make in (our_step, plus_step, bare_step))
    for other, what in zip(others, ("ip-adapter", "bare UNet"), strict=True):
        detail = f"{own / TERA:.4g} of {other / TERA:.4g} TFLOP/step"
        yield Line(f"{name} FLOP over {what}", own / other, most=True, detail=detail)
    for method, make in MASKED_STEPS.items():
        own = operations(make, shapes, setting)
        detail = f"{own / TERA:.4g} of {others[0] / TERA:.4g} TFLOP/step"
        yield Line(f"{name} FLOP {method} over ip-adapter", own / others[0], 1.0, most=True, detail=detail)
    if setting.operations:
        return
    ours, plus = (Weight.of(make, shapes, setting) for make in (our_step, plus_step))
    # The frozen weights of our step are among the other's.
    needed = plus.frozen + ours.trained + plus.trained + max(ours.moving, plus.moving)
    if needed > (free := free_bytes(setting.device)):
        yield too_large(name, needed, free)
    else:
        yield from compare(name, shapes, replace(setting, compile=False))  # like the others
    if setting.device.type != "cuda" or needed > free:
        yield memory(f"{name} memory over ip-adapter", ours.saved, plus.saved, "saved for backward", 1.15)
        yield memory(f"{name} peak over ip-adapter", ours.moving, plus.moving, "excluding the weights")
    yield from effects(name, shapes, setting)
    yield from card(name, shapes, setting)


def operations(make: Maker, shapes: Shapes, setting: ModelSetting) -> int:
    """Floating point operations of forward and backward, recomputation included: matrix products, convolutions and
    attention, counted on fake tensors."""
    setting = replace(setting, device=torch.device("cpu"), compile=False)
    with imagined():
        step = make(shapes, setting, build_diffusion(shapes, setting.dtype, setting.device))
        with FlopCounterMode(display=False) as counted:
            step.both_ways()
    return counted.get_total_flops()


def compare(name: str, shapes: Shapes, setting: ModelSetting) -> Iterator[Line]:
    """Our step vs the two others, on the same frozen weights."""
    diffusion = build_diffusion(shapes, setting.dtype, setting.device)
    ours, plus, plain = (make(shapes, setting, diffusion) for make in (our_step, plus_step, bare_step))
    steps = [setting.waited(step) for step in (ours, plus, plain)]
    mine, theirs, least = zip(*turns(steps, setting.repeats), strict=True)
    yield cost(f"{name} over ip-adapter", mine, theirs, 1, "step", 1.0)
    yield cost(f"{name} over bare UNet", mine, least, 1, "step", 1.5)
    for method, make in MASKED_STEPS.items():
        pair = [make(shapes, setting, diffusion), plus]
        mine, theirs = zip(*turns([setting.waited(step) for step in pair], setting.repeats), strict=True)
        yield cost(f"{name} {method} over ip-adapter", mine, theirs, 1, "step", 1.0)
    if setting.device.type == "cuda":
        own, other = (activation_bytes(step, setting) for step in (ours, plus))
        yield memory(f"{name} memory over ip-adapter", own, other, "at the peak", 1.15)


def activation_bytes(step: Step, setting: ModelSetting) -> int:
    """Peak of forward and backward beyond weights and gradients, as reported by the device."""
    step.both_ways()  # allocates the gradients
    return peak_bytes(step.both_ways, setting.device)


def memory(name: str, own: int, other: int, what: str, goal: float | None = None) -> Line:
    """The line of our bytes over the other's."""
    return Line(name, own / other, goal, most=True, detail=f"{own / MB:.1f} of {other / MB:.1f} MB {what}")


def effects(name: str, shapes: Shapes, setting: ModelSetting) -> Iterator[Line]:
    """Our step vs the same without each chosen option: gradient checkpointing, torch.compile, half precision.

    Memory saved by torch.compile is not reported, as bytes are counted on fake tensors, which it cannot compile.
    """
    others = {}
    if (ours := setting.gradient_checkpointing) != "text":
        others[f"checkpointing {ours}"] = replace(setting, gradient_checkpointing="text")
    if setting.compile:
        others["compile"] = replace(setting, compile=False)
    if setting.dtype != torch.float32:
        others[str(setting.dtype).removeprefix("torch.")] = replace(setting, dtype=torch.float32)
    for what, other in others.items():
        both = (setting, other)
        own, plain = (Weight.of(our_step, shapes, s) for s in both)
        if own.total + plain.total > (free := free_bytes(setting.device)):
            yield too_large(f"{name} {what}", own.total + plain.total, free)
        else:
            pair = [our_step(shapes, s, build_diffusion(shapes, s.dtype, s.device)) for s in both]
            with_it, without = zip(*turns([setting.waited(step) for step in pair], setting.repeats), strict=True)
            yield cost(f"{name} {what} time", with_it, without, 1, "step")
        if what != "compile":
            yield memory(f"{name} {what} memory", own.total, plain.total, "with weights and AdamW's state")


def card(name: str, shapes: Shapes, setting: ModelSetting) -> Iterator[Line]:
    """GB of a step in bfloat16 with one sample, up to 512 px, on fake tensors, with and without checkpointing."""
    side = min(512, shapes.size)
    small = replace(setting, size=side, batch=1, dtype=torch.bfloat16)
    modes: tuple[tuple[Checkpointing, str], ...] = (("text", ""), ("all", ", checkpointed"))
    for checkpointing, word in modes:
        weight = Weight.of(our_step, shapes, replace(small, gradient_checkpointing=checkpointing))
        parts = f"frozen {weight.frozen / GB:.2f}, trained with AdamW's state {weight.trained / GB:.2f}"
        detail = f"GB: {parts}, activations and gradients {weight.moving / GB:.2f}; bf16, batch 1"
        yield Line(f"{name} GB, {side} px{word}", weight.total / GB, CARD, most=True, detail=detail)


def our_step(shapes: Shapes, setting: ModelSetting, diffusion: Diffusion, method: Way = "mfi") -> Step:
    """A step with all losses of a method, from cached latents and hidden states."""
    unet: Any = diffusion.unet
    adapter = build_adapter(shapes, diffusion, method)
    if setting.gradient_checkpointing != "none":
        checkpoint_text(diffusion.text_encoders)
    if setting.gradient_checkpointing == "all":
        unet.enable_gradient_checkpointing()
    if setting.compile:
        unet.compile()
    rows, device, side = setting.batch, setting.device, latent_side(shapes, setting)
    masks = torch.zeros(rows, side, side, device=device)
    masks[:, side // 4 : side // 2, side // 4 : side // 2] = 1
    kept = torch.zeros(rows, dtype=torch.bool, device=device)
    batch = TrainingBatch(
        latents=torch.randn(rows, unet.config.in_channels, side, side, device=device),
        subject_masks=masks,
        captions=[PROMPT] * rows,
        class_nouns=[NOUN] * rows,
        reference=hidden_states(shapes, setting, rows, method),
        positive=hidden_states(shapes, setting, rows, method),
        similarity=torch.full((rows, rows), 0.5, device=device),
        subjects=torch.arange(rows, device=device),
        timesteps=torch.full((rows,), 500, device=device),
        noise=torch.randn(rows, unet.config.in_channels, side, side, device=device),
        drop_image=kept,
        drop_text=kept,
        positive_timesteps=torch.full((rows,), 300, device=device),
    )
    objective = ObjectiveConfig() if method == "mfi" else ObjectiveConfig(cscl=False, macl=False, location_weight=0)
    losses_of = method_of(adapter.config).losses

    def loss() -> Tensor:
        return losses_of(batch, adapter, adapter.config, diffusion, objective)["total"]

    return Step.of(loss, [unet, *diffusion.text_encoders, adapter])


MASKED_STEPS: dict[Way, Maker] = {method: partial(our_step, method=method) for method in MASKED}
"""The steps of RealCustom, with all features kept, and of RealCustom++."""


def plus_step(shapes: Shapes, setting: ModelSetting, diffusion: Diffusion) -> Step:
    """The step of IP-Adapter-plus's own script (tutorial_train_plus.py), which encodes images in the step."""
    unet, _ = ip_adapter_plus(shapes, diffusion.unet)
    if setting.gradient_checkpointing == "all":
        unet.enable_gradient_checkpointing()
    vision: Any = build_vision(shapes, setting.dtype, setting.device)
    rows, vae = setting.batch, cast(Any, diffusion.vae)

    def pixels(side: int) -> Tensor:
        return torch.randn(rows, 3, side, side, device=setting.device, dtype=setting.dtype)

    images, photos = pixels(setting.side(shapes)), pixels(shapes.vision["image_size"])
    timesteps = torch.full((rows,), 500, device=setting.device)

    def loss() -> Tensor:
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
            features = vision(photos, output_hidden_states=True).hidden_states[-2]
            text = encode_captions(diffusion.text_encoders, diffusion.tokenizers, [PROMPT] * rows)
        embeds = {"image_embeds": [features[:, None]]}
        return noise_loss(unet, diffusion, latents, torch.randn_like(latents), timesteps, text, embeds)

    return Step.of(loss, [unet, *diffusion.text_encoders, vae, vision])


def bare_step(shapes: Shapes, setting: ModelSetting, diffusion: Diffusion) -> Step:
    """Forward and backward of the UNet alone. The gradient is taken for the text states: like an adapter's, it reaches
    back to the first cross-attention."""
    unet = twin(diffusion.unet)
    if setting.gradient_checkpointing == "all":
        unet.enable_gradient_checkpointing()
    rows, side = setting.batch, latent_side(shapes, setting)
    with torch.no_grad():
        text = encode_captions(diffusion.text_encoders, diffusion.tokenizers, [PROMPT] * rows)
    text = replace(text, hidden=text.hidden.requires_grad_())
    size = (rows, unet.config.in_channels, side, side)
    latents, noise = (torch.randn(size, device=setting.device, dtype=setting.dtype) for _ in range(2))
    timesteps = torch.full((rows,), 500, device=setting.device)
    return Step.of(lambda: noise_loss(unet, diffusion, latents, noise, timesteps, text, {}), [unet])


def noise_loss(
    unet: Any,
    diffusion: Diffusion,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    text: TextCondition,
    embeds: dict[str, Any],
) -> Tensor:
    """Mean squared error of a stock UNet's noise prediction; `embeds`: conditions in addition to text and size."""
    scheduler: Any = diffusion.scheduler
    noisy = losses.noisy_latents(latents, noise, scheduler.alphas_cumprod, timesteps)
    added = (added_conditions(unet, text, uncropped(diffusion, noisy)) or {}) | embeds
    prediction = unet(noisy, timesteps, text.hidden[:, 0], added_cond_kwargs=added).sample
    return F.mse_loss(prediction.float(), noise.float())
