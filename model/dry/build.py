"""Models of given shapes with random weights, on the device and in the precision of the measurement."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from model.backbones.diffusion import Diffusion
from model.dry.shapes import Shapes


@contextmanager
def weights_as(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Initialise new modules on the device and in the precision of use: no float32 copy on the CPU first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


@cache
def tokenizer(vocabulary: int, length: int) -> CLIPTokenizer:
    """CLIP's own byte-pair tokenizer from open_clip's copy, truncated to a vocabulary and a caption length."""
    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    # 256 bytes, each alone and at the end of a word; start and end of a caption.
    merges = [tuple(line.split()) for line in lines[1 : 1 + max(0, vocabulary - 514)]]
    alphabet = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    alphabet += [chr(256 + n) for n in range(256 - len(alphabet))]
    words = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(merge) for merge in merges)]
    numbered = {word: n for n, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(numbered, merges=merges, model_max_length=length)


def frozen(module: Any) -> Any:
    """`module` in eval mode with gradients disabled. It is not moved: tensors without data cannot be."""
    return module.eval().requires_grad_(False)


def build_diffusion(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Diffusion:
    """The frozen base model."""
    tokenizers = tuple(tokenizer(text["vocab_size"], text["max_position_embeddings"]) for text in shapes.texts)
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    # A vocabulary smaller than the tokenizer's alphabet has other end tokens; if only sizes count, any will do.
    last = shapes.texts[0]["vocab_size"] - 1
    ends = {name: min(getattr(tokenizers[0], name), last) for name in ("bos_token_id", "eos_token_id")}
    with weights_as(dtype, device):
        unet, vae = UNet2DConditionModel(**shapes.unet), AutoencoderKL(**shapes.vae)
        texts = [kind(CLIPTextConfig(**text, **ends)) for kind, text in zip(kinds, shapes.texts, strict=False)]
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return Diffusion(
        vae=frozen(vae),
        unet=frozen(unet),
        text_encoders=tuple(frozen(text) for text in texts),
        tokenizers=cast(Any, tokenizers),
        scheduler=cast(Any, scheduler),
        name="random weights",
        revision="0",
    )
