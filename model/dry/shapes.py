"""Sizes of the published models, without weights, and of tiny ones with the same architecture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
VIT_L_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "max_position_embeddings": 77,
}
BIG_G_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class Shapes:
    """Configurations of one text-to-image model and of its adapters."""

    size: int
    """Side of its native images, pixels."""
    unet: dict[str, Any]
    """Differences from diffusers' defaults, which are Stable Diffusion's."""
    vae: dict[str, Any]
    texts: tuple[dict[str, Any], ...]
    """CLIP text encoders, one or two."""
    vision: dict[str, Any]
    """CLIP image encoder whose hidden states are read."""
    projection: dict[str, int]
    """Sizes of IP-Adapter-plus's image projection, as published."""
    adapter: dict[str, Any]
    """Differences from AdapterConfig's defaults."""
    layers: int = 3
    """K, number of hidden states that our adapter reads."""
    tokens: int | None = None
    """N of a hidden state; None: the patches of `vision` and its CLS."""
    face: dict[str, Any] = field(default_factory=dict)
    """Face recogniser that DreamIdentity's adapter reads, as `FeatureSource.network`."""
    views: tuple[int, int, int] = (5, 729, 2176)
    """K, N, d of the features that RealCustom++'s adapter reads: low view and four high ones, SigLIP so400m and DINOv2
    large joined."""


# https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5, unet/config.json; ip-adapter-plus_sd15.
SD15 = Shapes(
    size=512,
    unet={"sample_size": 64, "cross_attention_dim": 768},
    vae={**VAE, "scaling_factor": 0.18215},
    texts=(VIT_L_TEXT,),
    vision=VIT_H,
    projection={"hidden_dims": 768, "dim_head": 64, "heads": 12, "num_queries": 16, "depth": 4},
    adapter={},
)

# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, unet/config.json; ip-adapter-plus_sdxl_vit-h.
SDXL = Shapes(
    size=1024,
    unet={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae={**VAE, "scaling_factor": 0.13025},
    texts=(VIT_L_TEXT, BIG_G_TEXT),
    vision=VIT_H,
    projection={"hidden_dims": 1280, "dim_head": 64, "heads": 20, "num_queries": 16, "depth": 4},
    adapter={},
)

TINY_VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 8,
    "projection_dim": 8,
}
TINY_TEXT = {
    "vocab_size": 2514,
    "hidden_size": 20,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 12,
    "max_position_embeddings": 24,
}
TINY = Shapes(
    size=16,
    unet={
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": 20,
    },
    vae={
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
    },
    texts=(TINY_TEXT,),
    vision=TINY_VISION,
    projection={"hidden_dims": 16, "dim_head": 8, "heads": 2, "num_queries": 4, "depth": 1},
    adapter={"width": 16, "heads": 2, "depth": 1, "visual_tokens": 3, "fourier_pairs": 8, "projector": {"head": 8}},
    views=(5, 4, 24),
)
TINY_XL = Shapes(
    size=16,
    unet={
        **TINY.unet,
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 48,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
    },
    vae=TINY.vae,
    texts=(TINY_TEXT, {**TINY_TEXT, "hidden_size": 28}),
    vision=TINY_VISION,
    projection=TINY.projection,
    adapter=TINY.adapter,
    views=TINY.views,
)

SHAPES = {"full": (SD15, SDXL), "tiny": (TINY, TINY_XL)}
"""Choices of `--shapes`: the models like Stable Diffusion 1.5 and like SDXL."""
