"""Tiny random base models with the classes and configuration of the real ones."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from model.adapter import Adapter
from model.attention import Granularity

FEATURE_LAYERS, FEATURE_TOKENS, FEATURE_WIDTH = (1, 2, 3), 5, 24


@dataclass(frozen=True)
class TinyDiffusion:
    """The fields of `model.backbones.diffusion.Diffusion`."""

    vae: Any
    unet: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler: Any
    name: str = "tiny"
    revision: str | None = "0"


@cache
def tokenizer() -> CLIPTokenizer:
    """CLIP's own byte-pair vocabulary, cut after 2000 merges, out of open_clip's copy."""
    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1:2001]
    alphabet = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    alphabet += [chr(256 + n) for n in range(256 - len(alphabet))]
    words = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m.split()) for m in merges)]
    vocabulary = {word: n for n, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocabulary, merges=[tuple(m.split()) for m in merges], model_max_length=24)


def text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        eos_token_id=tokenizer().eos_token_id,
        bos_token_id=tokenizer().bos_token_id,
    )


def scheduler(**overrides: Any) -> DDIMScheduler:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return DDIMScheduler(**{**settings, "set_alpha_to_one": False, "steps_offset": 1, **overrides})


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def unet(cross_attention_dim: int, **overrides: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": cross_attention_dim,
    }
    return UNet2DConditionModel(**{**settings, **overrides})


def freeze(diffusion: TinyDiffusion) -> TinyDiffusion:
    for module in (diffusion.vae, diffusion.unet, *diffusion.text_encoders):
        module.eval().requires_grad_(False)
    return diffusion


def tiny_sd() -> TinyDiffusion:
    """Like SD 1.5: one text encoder, one attention layer per Transformer2D group, 7 of them."""
    torch.manual_seed(0)
    text = CLIPTextModel(text_config(20))
    return freeze(TinyDiffusion(vae(), unet(20), (text,), (tokenizer(),), scheduler()))


def tiny_sdxl() -> TinyDiffusion:
    """Like SDXL: two text encoders, size conditions, several attention layers per group."""
    torch.manual_seed(0)
    texts = (
        CLIPTextModel(text_config(20)),
        CLIPTextModelWithProjection(text_config(28)),
    )
    network = unet(
        48,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )
    return freeze(TinyDiffusion(vae(), network, texts, (tokenizer(), tokenizer()), scheduler()))


def make_adapter(diffusion: TinyDiffusion, granularity: Granularity = "group", **sizes: Any) -> Adapter:
    torch.manual_seed(1)
    defaults: dict[str, Any] = {"width": 16, "heads": 2, "depth": 2, "visual_tokens": 3, "fourier_pairs": 8}
    defaults |= {"feature_layers": FEATURE_LAYERS, "feature_width": FEATURE_WIDTH, "image_encoder": "tiny-clip"}
    adapter = Adapter.for_unet(
        diffusion.unet,
        base_model=diffusion.name,
        base_revision=diffusion.revision,
        text_widths=[encoder.config.hidden_size for encoder in diffusion.text_encoders],
        granularity=granularity,
        **{**defaults, **sizes},
    )
    adapter.install(diffusion.unet)
    return adapter


def make_features(batch: int, seed: int = 2, layers: int = len(FEATURE_LAYERS)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, layers, FEATURE_TOKENS, FEATURE_WIDTH, generator=generator)


def sd15_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


class FakeClip:
    """An image encoder that remembers what it was asked."""

    def __init__(self, name: str = "tiny-clip") -> None:
        self.name, self.seen = name, []

    def hidden_states(self, images, layers):
        self.seen.append((images, layers))
        return make_features(len(images))
