"""Tiny random face recognisers in the format of published checkpoints, and adapters that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from model.backbones.features.face import IDENTITY, describe_net
from model.backbones.variant import FaceSpec
from model.pipeline import build_pipeline
from tests.world.models import TinyDiffusion, make_adapter

SIDE, PATCH, BLOCKS, WIDTH, ID_WIDTH = 16, 8, 6, 24, 10
LAYERS = (1, 3, 5)
"""0-based: after blocks 2, 4 and 6."""
COLUMNS = len(LAYERS) * WIDTH + ID_WIDTH
FACES = {
    "portraits_named": 1,
    "portraits_unnamed": 2,
    "portraits_views": 4,
    "ffhq_photos": 3,
    "dreambench_named": 1,
    "dreambench_unnamed": 1,
    "dreambench_held_out": 2,
    "dreambench_photos": 3,
}
"""A small world of faces, as params.yaml's toybox.faces."""
SIZES: dict[str, Any] = {"encoder": "dreamidentity", "text_tokens": 2, "tv_fusion": False, "location_masks": False}


def write_recogniser(folder: Path, kind: str = "vit", seed: int = 0) -> Path:
    """A folder of a `vit`, `dinov2` or `resnet` with its processor and the Linear of its ID vector."""
    torch.manual_seed(seed)
    shape = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "initializer_range": 0.3}
    size = {"image_size": SIDE, "patch_size": PATCH}
    network: Any = {
        "vit": lambda: ViTModel(ViTConfig(**shape, **size, intermediate_size=32), add_pooling_layer=False),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**shape, **size, mlp_ratio=2)),
        "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, WIDTH], depths=[1, 1])),
    }[kind]()
    network.save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    BitImageProcessor(do_resize=True, size=side, do_center_crop=False).save_pretrained(folder)
    linear = {"weight": torch.randn(ID_WIDTH, WIDTH), "bias": torch.randn(ID_WIDTH)}
    save_file(linear, folder / IDENTITY)
    return folder


def face_spec(folder: Path, **changes: Any) -> FaceSpec:
    return FaceSpec(**{"path": str(folder), "layers": LAYERS, **changes})


def network(folder: Path, **changes: Any) -> dict[str, Any]:
    """The recogniser's part of `AdapterConfig.face`, as adapter.json holds it."""
    found: dict[str, Any] = json.loads(json.dumps(describe_net(face_spec(folder))))
    return found | changes


def word_adapter(diffusion: TinyDiffusion, folder: Path, train: str = "all", **sizes: Any) -> Any:
    """An adapter of DreamIdentity with random weights, its recogniser included."""
    places = {"all": ((0, 1, 2), SIDE), "projector": ((0,), COLUMNS)}[train]
    face = network(folder, train=train) | sizes.pop("face", {})
    of_features = {"feature_layers": places[0], "feature_width": places[1]}
    return make_adapter(diffusion, **{**SIZES, **of_features, "face": face, **sizes})


def make_faces(count: int, train: str = "all", seed: int = 2) -> Tensor:
    """Features of `count` photos, as a source gives them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *{"all": (3, SIDE, SIDE), "projector": (1, 1, COLUMNS)}[train], generator=generator)


def word_pipeline(diffusion: TinyDiffusion, folder: Path, train: str = "projector", **sizes: Any) -> Any:
    """The pipeline of `word_adapter`."""
    built = build_pipeline(diffusion, word_adapter(diffusion, folder, train, **sizes).eval())
    built.set_progress_bar_config(disable=True)
    return built
