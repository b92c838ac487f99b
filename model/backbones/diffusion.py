"""The latent diffusion model to customize: Stable Diffusion (Rombach et al. 2022) or SDXL (Podell et al. 2023)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
)

from model.backbones.frozen import freeze
from model.backbones.hub import from_pretrained, identify, reading, require_vocabulary, resolve
from model.backbones.variant import DiffusionSpec
from runtime.errors import ModelError

TEXT_ENCODERS = {
    "StableDiffusionPipeline": ("text_encoder",),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2"),
}
"""Supported pipelines and their text encoders, in the order in which hidden states are concatenated."""

TEXT_CLASSES: dict[str, type[CLIPTextModel] | type[CLIPTextModelWithProjection]] = {
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}


@dataclass(frozen=True)
class Diffusion:
    """A frozen text-to-image model as its components."""

    vae: AutoencoderKL
    """float32 if the rest is float16 and its config sets `force_upcast`: such a VAE overflows in float16."""
    unet: UNet2DConditionModel
    text_encoders: tuple[CLIPTextModel | CLIPTextModelWithProjection, ...]
    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    scheduler: SchedulerMixin
    """As the checkpoint configures it; training and sampling build theirs from its config."""
    name: str
    """Hub id, or the local path as written in the variant."""
    revision: str
    """Hub commit, or the SHA-256 over the local weight files."""


def load_diffusion(spec: DiffusionSpec, dtype: torch.dtype, device: str | torch.device) -> Diffusion:
    """The frozen diffusion model of `spec`, a diffusers pipeline folder, with weights in `dtype` on `device`.

    Raises ModelError if the folder is missing, incomplete or of another pipeline, or its components do not match.
    """
    folder = resolve(spec, list(patterns(suffix(spec))))
    encoders = text_encoders(folder, spec.path)
    unet = part(spec, folder, "unet", UNet2DConditionModel, dtype)
    vae = part(spec, folder, "vae", AutoencoderKL, vae_dtype(spec, folder, dtype))
    texts = tuple(part(spec, folder, name, TEXT_CLASSES[kind], dtype) for name, kind in encoders.items())
    tokenizers = tuple(tokenizer(spec, folder, name.replace("text_encoder", "tokenizer")) for name in encoders)
    check_sizes(spec.path, unet, vae, texts, tokenizers)
    names = ["unet", "vae", *encoders]
    files = [file for name in names for file in weight_files(folder / name, suffix(spec))]
    name, revision = identify(spec, files)
    return Diffusion(
        vae=freeze(vae, device),
        unet=freeze(unet, device),
        text_encoders=tuple(freeze(text, device) for text in texts),
        tokenizers=tokenizers,
        scheduler=scheduler(spec, folder),
        name=name,
        revision=revision,
    )


def load_vae(spec: DiffusionSpec, dtype: torch.dtype, device: str | torch.device) -> AutoencoderKL:
    """Only the frozen VAE of `spec`, for code that encodes or decodes and never samples; raises as `load_diffusion`."""
    wanted = [pattern for pattern in patterns(suffix(spec)) if pattern.startswith("vae/")]
    folder = resolve(spec, wanted)
    return freeze(part(spec, folder, "vae", AutoencoderKL, vae_dtype(spec, folder, dtype)), device)


def load_tokenizers(spec: DiffusionSpec) -> list[tuple[PreTrainedTokenizerBase, int]]:
    """The tokenizers of `spec`, each with the tokens of its text encoder's captions, start and end included; reads no
    weights. Raises as `load_diffusion`."""
    wanted = [pattern for pattern in patterns("") if not pattern.endswith(".safetensors")]
    folder = resolve(spec, wanted)
    found = []
    for name in text_encoders(folder, spec.path):
        words = tokenizer(spec, folder, name.replace("text_encoder", "tokenizer"))
        with reading(f"{spec.path}/{name}", "a text encoder"):
            config = CLIPTextConfig.from_pretrained(folder / name, local_files_only=True)
        found.append((words, min(int(words.model_max_length), int(config.max_position_embeddings))))
    return found


def suffix(spec: DiffusionSpec) -> str:
    """Part of the weight files' names before `.safetensors`: `.fp16` or nothing."""
    return f".{spec.weights}" if spec.weights else ""


def patterns(ending: str) -> Iterator[str]:
    """Globs of the files a pipeline needs, without other copies of the weights, safety checker or full checkpoints."""
    yield "model_index.json"
    for folder in ("scheduler", "tokenizer", "tokenizer_2"):
        yield f"{folder}/*"
    for folder, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("text_encoder_2", "model"),
    ):
        yield f"{folder}/config.json"
        yield f"{folder}/{stem}{ending}.safetensors"


def weight_files(folder: Path, ending: str) -> list[Path]:
    """The weight files in a component's folder that are loaded for this ending."""
    return sorted(file for file in folder.glob("*model*.safetensors") if (".fp16" in file.name) == bool(ending))


def text_encoders(folder: Path, path: str) -> dict[str, str]:
    """Text encoder folders and their classes, from `model_index.json`."""
    with reading(path, "a diffusers pipeline folder with model_index.json"):
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        pipeline = index["_class_name"]
        if pipeline not in TEXT_ENCODERS:
            known = " and ".join(TEXT_ENCODERS)
            raise ModelError(f"{path}: model_index.json names {pipeline}; only {known} are supported")
        encoders = {name: index[name][1] for name in TEXT_ENCODERS[pipeline]}
    for name, kind in encoders.items():
        if kind not in TEXT_CLASSES:
            raise ModelError(f"{path}: {name} is a {kind}; only {' and '.join(TEXT_CLASSES)} are supported")
    return encoders


def part(spec: DiffusionSpec, folder: Path, name: str, kind: Any, dtype: torch.dtype) -> Any:
    """One network of the pipeline in `dtype`, on the CPU."""
    # The two libraries name this option differently; without it transformers would keep the file's dtype.
    option = "torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype"
    place = f"{spec.path}/{name}"
    options: dict[str, Any] = {"variant": spec.weights, option: dtype}
    return from_pretrained(kind, folder / name, place, kind.__name__, **options)


def vae_dtype(spec: DiffusionSpec, folder: Path, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 for a VAE whose activations overflow in float16."""
    with reading(f"{spec.path}/vae", "a VAE with config.json"):
        config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        # AutoencoderKL's default, which configs older than the key rely on, is True.
        return torch.float32 if dtype == torch.float16 and config.get("force_upcast", True) else dtype


def tokenizer(spec: DiffusionSpec, folder: Path, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `name`, of the class named in its own config."""
    with reading(f"{spec.path}/{name}", "a tokenizer"):
        require_vocabulary(folder / name)
        return AutoTokenizer.from_pretrained(folder / name, local_files_only=True)


def scheduler(spec: DiffusionSpec, folder: Path) -> SchedulerMixin:
    """The noise scheduler, of the class named in its own config."""
    place = f"{spec.path}/scheduler"
    with reading(place, "a diffusers scheduler"):
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        kind: Any = getattr(diffusers, config["_class_name"])
        if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
            raise ModelError(f"{place}: '{config['_class_name']}' is not a diffusers scheduler; correct the file")
        found: SchedulerMixin = cast(Any, kind).from_config(config)
    return found


def check_sizes(path: str, unet: Any, vae: Any, texts: tuple[Any, ...], tokenizers: tuple[Any, ...]) -> None:
    """Raise ModelError if tokens, text states or latents of one component do not fit the next."""
    for text, words in zip(texts, tokenizers, strict=True):
        if len(words) > text.config.vocab_size:
            raise ModelError(
                f"{path}: a tokenizer has {len(words)} tokens, but its text encoder embeds {text.config.vocab_size};"
                " use components of one model"
            )
    if unet.config.in_channels != vae.config.latent_channels:
        raise ModelError(
            f"{path}: the UNet reads {unet.config.in_channels} latent channels, but the VAE produces"
            f" {vae.config.latent_channels}; use components of one model"
        )
    width = sum(text.config.hidden_size for text in texts)
    if unet.config.cross_attention_dim != width:
        raise ModelError(
            f"{path}: the UNet's cross-attention expects width {unet.config.cross_attention_dim}, but the text"
            f" encoders give {width}; use components of one model"
        )
