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
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from model.backbones.frozen import freeze
from model.backbones.hub import from_pretrained, identify, reading, require_vocabulary, resolve
from model.backbones.variant import DiffusionSpec
from runtime.errors import ModelError

TEXT_ENCODERS = {
    "StableDiffusionPipeline": ("text_encoder",),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2"),
}
"""The pipelines that are understood, and the text encoders of each, in the order in which their widths are joined."""

TEXT_CLASSES: dict[str, type[CLIPTextModel] | type[CLIPTextModelWithProjection]] = {
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}


@dataclass(frozen=True)
class Diffusion:
    """A frozen text-to-image model in its parts."""

    vae: AutoencoderKL
    """float32 where the rest is float16 and its configuration says `force_upcast`: such a VAE overflows in float16."""
    unet: UNet2DConditionModel
    text_encoders: tuple[CLIPTextModel | CLIPTextModelWithProjection, ...]
    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    scheduler: SchedulerMixin
    """As the checkpoint configures it; training and sampling build theirs from its configuration."""
    name: str
    """Hub id, or the local path as the variant writes it."""
    revision: str
    """Commit on the hub, or the SHA-256 over the local weight files."""


def load_diffusion(spec: DiffusionSpec, dtype: torch.dtype, device: str | torch.device) -> Diffusion:
    """The frozen diffusion model of `spec`, a diffusers pipeline folder, with weights as `dtype` on `device`.

    Raises ModelError where the folder is missing, incomplete, of another pipeline, or its parts do not fit together.
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
    """Only the frozen VAE of `spec`, for who encodes or decodes and never samples; raises as `load_diffusion`."""
    wanted = [pattern for pattern in patterns(suffix(spec)) if pattern.startswith("vae/")]
    folder = resolve(spec, wanted)
    return freeze(part(spec, folder, "vae", AutoencoderKL, vae_dtype(spec, folder, dtype)), device)


def suffix(spec: DiffusionSpec) -> str:
    """What stands before `.safetensors` in the names of the weight files: `.fp16` or nothing."""
    return f".{spec.weights}" if spec.weights else ""


def patterns(ending: str) -> Iterator[str]:
    """Globs of the files a pipeline needs: no other copy of the weights, no safety checker, no full checkpoint."""
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
    """The weight files in a part's folder that a load with this ending reads."""
    return sorted(file for file in folder.glob("*model*.safetensors") if (".fp16" in file.name) == bool(ending))


def text_encoders(folder: Path, path: str) -> dict[str, str]:
    """Text encoder folders and their classes, from `model_index.json`."""
    with reading(path, "a diffusers pipeline folder with model_index.json"):
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        pipeline = index["_class_name"]
        if pipeline not in TEXT_ENCODERS:
            known = " and ".join(TEXT_ENCODERS)
            raise ModelError(f"{path}: model_index.json names {pipeline}; only {known} are understood")
        encoders = {name: index[name][1] for name in TEXT_ENCODERS[pipeline]}
    for name, kind in encoders.items():
        if kind not in TEXT_CLASSES:
            raise ModelError(f"{path}: {name} is a {kind}; only {' and '.join(TEXT_CLASSES)} are understood")
    return encoders


def part(spec: DiffusionSpec, folder: Path, name: str, kind: Any, dtype: torch.dtype) -> Any:
    """One network of the pipeline as `dtype`, on the CPU."""
    # The two libraries name one option differently, and transformers would else keep the dtype of the file.
    option = "torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype"
    place = f"{spec.path}/{name}"
    return from_pretrained(kind, folder / name, place, kind.__name__, variant=spec.weights, **{option: dtype})


def vae_dtype(spec: DiffusionSpec, folder: Path, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 for a VAE whose activations overflow in float16."""
    with reading(f"{spec.path}/vae", "a VAE with config.json"):
        config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        # AutoencoderKL's own default, which configurations older than the key rely on, is True.
        return torch.float32 if dtype == torch.float16 and config.get("force_upcast", True) else dtype


def tokenizer(spec: DiffusionSpec, folder: Path, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in `name`, of the class its own configuration names."""
    with reading(f"{spec.path}/{name}", "a tokenizer"):
        require_vocabulary(folder / name)
        return AutoTokenizer.from_pretrained(folder / name, local_files_only=True)


def scheduler(spec: DiffusionSpec, folder: Path) -> SchedulerMixin:
    """The noise scheduler, of the class its own configuration names."""
    place = f"{spec.path}/scheduler"
    with reading(place, "a diffusers scheduler"):
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        kind: Any = getattr(diffusers, config["_class_name"])
        if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
            raise ModelError(f"{place}: '{config['_class_name']}' is no diffusers scheduler; correct the file")
        found: SchedulerMixin = cast(Any, kind).from_config(config)
    return found


def check_sizes(path: str, unet: Any, vae: Any, texts: tuple[Any, ...], tokenizers: tuple[Any, ...]) -> None:
    """Raise ModelError where tokens, text states or latents of one part do not fit the next."""
    for text, words in zip(texts, tokenizers, strict=True):
        if len(words) > text.config.vocab_size:
            raise ModelError(
                f"{path}: a tokenizer has {len(words)} words and its text encoder embeds {text.config.vocab_size}; use"
                " parts of one model"
            )
    if unet.config.in_channels != vae.config.latent_channels:
        raise ModelError(
            f"{path}: the UNet reads {unet.config.in_channels} latent channels and the VAE makes"
            f" {vae.config.latent_channels}; use parts of one model"
        )
    width = sum(text.config.hidden_size for text in texts)
    if unet.config.cross_attention_dim != width:
        raise ModelError(
            f"{path}: the UNet's cross-attention reads width {unet.config.cross_attention_dim} and the text encoders"
            f" give {width}; use parts of one model"
        )
