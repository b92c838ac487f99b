"""Estimate of a training run's memory on each device, made before it starts.

Weights and optimizer state are counted from the configs by what DeepSpeed keeps of them; activations are measured in a
training step on tensors without values, so neither weights nor a GPU are needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model.adapter import Adapter
from model.backbones.diffusion import text_encoders
from model.backbones.features.source import FeatureSource
from model.backbones.hub import reading, resolve
from model.backbones.variant import Variant, load_variant
from model.dry.build import build_diffusion, weights_as
from model.dry.memory import GB, LiveTensors, imagined, weight_bytes
from model.dry.shapes import SHAPES, Shapes
from model.methods.realcustom_pp.projector import HIGH, SHALLOW
from model.methods.registry import method_of
from model.objective import TrainingBatch
from model.prompt import checkpoint_text
from runtime.cli import read_params, shared_options
from runtime.digest import digest
from runtime.errors import UserError
from runtime.files import write_json
from train.recipe import ModelParams, TrainParams

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Most elements that ZeRO 3 keeps gathered: DeepSpeed's stage3_max_live_parameters.
LIVE = 10**9
BUCKET = 50_000_000  # elements; see train.distributed.engine.engine_config


@dataclass(frozen=True)
class StepMemory:
    """Sizes of a training step, independent of how it is spread over ranks."""

    frozen: int
    """Elements of the frozen UNet and text encoders."""
    trained: int
    """Elements of the adapter."""
    activations: int
    """Peak bytes of one rank's forward and backward pass, without finished gradients."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the peak of a step."""

    frozen: int
    """Weights of the backbone, including those gathered at once under ZeRO 3."""
    trained: int
    """Weights of the adapter."""
    gradients: int
    """Including DeepSpeed's gradient bucket."""
    optimizer: int
    """AdamW's moments and float32 weights; the moving average."""
    activations: int
    """Those of the step, or AdamW's temporaries if larger."""
    host: int
    """Offloaded to CPU memory; not part of the total."""

    @property
    def total(self) -> int:
        """Total on the device."""
        return self.frozen + self.trained + self.gradients + self.optimizer + self.activations

    def line(self) -> str:
        """Total and parts in one line."""
        names = ("frozen", "trained", "gradients", "optimizer", "activations")
        parts = ", ".join(f"{name} {size(getattr(self, name))}" for name in names)
        host = f"; {size(self.host)} per rank in CPU memory" if self.host else ""
        return f"{size(self.total)} on each device ({parts}){host}"


def spread(step: StepMemory, params: TrainParams, ranks: int) -> Memory:
    """Memory of a step on each of `ranks` devices under the precision, ZeRO stage and offload of `params`."""
    stage, width = params.zero_stage, DTYPES[params.precision].itemsize
    share = ranks if stage else 1
    # ZeRO keeps its own float32 weights even if the model's are float32.
    numbers = 12 if stage or width < 4 else 8
    optimizer = step.trained * (numbers + (0 if params.ema is None else 4)) // share
    gradients = step.trained * width // (ranks if stage >= 2 else 1)
    bucket = min(step.trained, BUCKET) * width if stage else 0
    # AdamW's step allocates the square roots, and the gradients as float32.
    temporary = step.trained * 12 // share
    frozen, trained = step.frozen * width, step.trained * width
    host = 0
    if stage == 3:
        live = min(step.frozen + step.trained, LIVE) * width
        whole = frozen + trained
        frozen = frozen // ranks + max(0, live - whole // ranks)
        trained = trained // ranks
    if params.offload != "none":
        host, optimizer, temporary = optimizer + temporary, 0, 0
    if params.offload == "all":
        host += (step.frozen + step.trained) * width // ranks
        frozen, trained = min(step.frozen + step.trained, LIVE) * width, 0
    return Memory(frozen, trained, gradients + bucket, optimizer, max(step.activations, temporary), host)


def weigh(shapes: Shapes, model: ModelParams, params: TrainParams, rows: int) -> StepMemory:
    """The step of `rows` samples on one rank, measured on tensors without values."""
    dtype, cpu = DTYPES[params.precision], torch.device("cpu")
    with imagined():
        diffusion = build_diffusion(shapes, dtype, cpu)
        unet: Any = diffusion.unet
        if params.gradient_checkpointing == "all":
            unet.enable_gradient_checkpointing()
        if params.gradient_checkpointing != "none":
            checkpoint_text(diffusion.text_encoders, by_layer=params.zero_stage == 3)
        with weights_as(dtype, cpu):
            adapter = Adapter.for_unet(
                unet,
                base_model="",
                base_revision=None,
                image_encoder="",
                feature_layers=tuple(range(shapes.layers)),
                feature_width=shapes.vision["hidden_size"],
                text_widths=[text["hidden_size"] for text in shapes.texts],
                **model.sizes(shapes.face),
            )
        adapter.install(unet)
        for parameter in adapter.parameters():  # each rank's reduction frees a gradient as soon as it is ready
            parameter.register_post_accumulate_grad_hook(drop_gradient)
        batch = imagined_batch(shapes, unet.config.in_channels, rows)
        with LiveTensors() as live:
            losses = method_of(adapter.config).losses(
                batch, adapter, adapter.config, diffusion, params.objective.config()
            )
            losses["total"].backward()
    frozen = weight_bytes(p for part in (unet, *diffusion.text_encoders) for p in part.parameters())
    trained = weight_bytes(adapter.parameters())
    return StepMemory(frozen // dtype.itemsize, trained // dtype.itemsize, live.peak)


def drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def imagined_batch(shapes: Shapes, channels: int, rows: int) -> TrainingBatch:
    """A batch without values, of the sizes that training reads."""
    side, hidden = latent_side(shapes), (rows, *hidden_shape(shapes))
    kept = torch.zeros(rows, dtype=torch.bool)
    return TrainingBatch(
        latents=torch.zeros(rows, channels, side, side),
        subject_masks=torch.zeros(rows, side, side),
        captions=["a red mug on a table in the snow"] * rows,
        class_nouns=["mug"] * rows,
        reference=torch.zeros(hidden, dtype=torch.float16),
        positive=torch.zeros(hidden, dtype=torch.float16),
        similarity=torch.zeros(rows, rows),
        subjects=torch.arange(rows),
        timesteps=torch.zeros(rows, dtype=torch.int64),
        noise=torch.zeros(rows, channels, side, side),
        drop_image=kept,
        drop_text=kept,
        positive_timesteps=torch.zeros(rows, dtype=torch.int64),
    )


def latent_side(shapes: Shapes) -> int:
    """Height and width of a latent."""
    return shapes.size // 2 ** (len(shapes.vae["block_out_channels"]) - 1)


def hidden_shape(shapes: Shapes) -> tuple[int, int, int]:
    """Layers, tokens and width of a photo's hidden states."""
    if shapes.tokens is not None:
        return shapes.layers, shapes.tokens, shapes.vision["hidden_size"]
    tokens = (shapes.vision["image_size"] // shapes.vision["patch_size"]) ** 2 + 1
    return shapes.layers, tokens, shapes.vision["hidden_size"]


def shapes_of(variant: Variant, source: FeatureSource) -> Shapes:
    """Sizes of a variant and of the hidden states of `source` from their config files, the only ones fetched."""
    spec = variant.diffusion
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    folder = resolve(spec, ["model_index.json", *(f"{part}/config.json" for part in parts)])
    with reading(spec.path, "a diffusers pipeline folder"):
        unet, vae, *texts = (
            settings(folder / part / "config.json") for part in ("unet", "vae", *text_encoders(folder, spec.path))
        )
    layers, tokens, width = source.shape
    return Shapes(
        size=variant.resolution,
        unet=unet,
        vae=vae,
        texts=tuple({name: text[name] for name in TEXT_SIZES if name in text} for text in texts),
        vision={"hidden_size": width},
        projection={},
        adapter={},
        layers=layers,
        tokens=tokens,
        face=source.network,
    )


TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "projection_dim",
    "max_position_embeddings",
    "hidden_act",
)


def settings(file: Path) -> dict[str, Any]:
    """A config without the library's own entries, which start with an underscore."""
    return {key: value for key, value in json.loads(file.read_text(encoding="utf-8")).items() if key[0] != "_"}


def estimate(params: TrainParams, model: ModelParams, variant: Variant, ranks: int, work: Path) -> Memory:
    """Memory of a run; the step, which takes seconds to measure, is cached in `work` for the next start."""
    shapes, rows = shapes_of(variant, model.features(variant)), params.rows(ranks)
    inputs = [vars(shapes), model.model_dump(), params.objective.model_dump(), rows, params.zero_stage == 3]
    file = work / "memory" / f"{digest(inputs, params.precision, params.gradient_checkpointing)}.json"
    try:
        step = StepMemory(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        step = weigh(shapes, model, params, rows)
        write_json(file, vars(step))
    return spread(step, params, ranks)


def table(params: TrainParams, model: ModelParams, ranks: int, shapes: dict[str, Shapes]) -> Iterator[str]:
    """Markdown rows: GB on each of `ranks` devices, one row per model and size, one column per ZeRO stage."""
    yield "| model, px | frozen | trained | activations | " + " | ".join(f"ZeRO {stage}" for stage in range(4)) + " |"
    yield "|---|" + "---|" * 7
    for name, found in shapes.items():
        found = as_read(found, model)
        for side in (512, 768, 1024):
            staged = [params.model_copy(update={"zero_stage": stage}) for stage in range(4)]
            # All stages but 3 run the same step.
            steps = [weigh(replace(found, size=side), model, staged[stage], params.rows(ranks)) for stage in (0, 3)]
            stages = [spread(steps[stage == 3], staged[stage], ranks) for stage in range(4)]
            parts = (stages[0].frozen, stages[0].trained, stages[0].activations)
            numbers = [f"{value / GB:.1f}" for value in (*parts, *(memory.total for memory in stages))]
            yield f"| {name}, {side} | {' | '.join(numbers)} |"


def as_read(shapes: Shapes, model: ModelParams) -> Shapes:
    """Published sizes with the features that the method reads, where these are not those of its CLIP."""
    if model.encoder == "dreamidentity":
        raise UserError(
            "--table has no published face recogniser for dreamidentity; leave it out, and name yours in the variant"
        )
    if model.encoder != "realcustom_pp":
        return shapes
    _, tokens, width = shapes.views
    views = 1 + HIGH * model.projector.high + SHALLOW * model.projector.shallow
    return replace(shapes, layers=views, tokens=tokens, vision={"hidden_size": width})


def size(count: int) -> str:
    """Bytes in human-readable form."""
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / 1e6:.1f} MB"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("--ranks", type=int, help="number of devices (default: train.ranks)")
    parser.add_argument(
        "--table", action="store_true", help="published models x size x ZeRO stage, for 8 or more devices"
    )
    shared_options(parser)


def main(options: argparse.Namespace) -> None:
    """Print the estimate."""
    params = read_params(options)
    train, model = params.section("train", TrainParams), params.section("model", ModelParams)
    ranks = options.ranks or train.ranks
    if ranks < 1:
        raise UserError(f"--ranks is {ranks}; give at least 1")
    rows = train.rows(ranks)
    about = f"{train.precision}, {rows} samples on each of {ranks} ranks, checkpointing {train.gradient_checkpointing}"
    if options.table:
        print(f"GB on each device; {about}, offload {train.offload}")
        for line in table(train, model, ranks, dict(zip(("SD 1.5", "SDXL"), SHAPES["full"], strict=True))):
            print(line, flush=True)
        return
    variant = load_variant(params.variant)
    memory = estimate(train, model, variant, ranks, Path(params.run.work) / "train")
    print(f"{variant.name}, {variant.resolution} px, {about}, ZeRO-{train.zero_stage}, offload {train.offload}:")
    for name in ("frozen", "trained", "gradients", "optimizer", "activations", "total"):
        print(f"{name:12} {size(getattr(memory, name)):>12}")
    if memory.host:
        print(f"{'CPU memory':12} {size(memory.host):>12}")
