"""Checkpoints with random weights in published formats, for models that the variant does not name.

The smaller a model, the larger the share of what a stage does besides its forward passes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    GroundingDinoConfig,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
)

from model.backbones.hub import no_progress_bar, resolve
from model.backbones.variant import DetectorSpec, SamSpec

SIDE = 64
"""Side of what the small SAM 2 reads, pixels."""
SAM2 = {
    "vision_config": {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 48,
            "blocks_per_stage": [1, 2, 3, 1],
            "embed_dim_per_stage": [48, 96, 192, 384],
            "window_size_per_stage": [8, 4, 4, 2],
            "global_attention_blocks": [4],
            "image_size": [SIDE, SIDE],
        },
        "backbone_channel_list": [384, 192, 96, 48],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 128,
    },
    "prompt_encoder_config": {"hidden_size": 128, "image_size": SIDE},
    "mask_decoder_config": {"hidden_size": 128, "mlp_dim": 256, "num_attention_heads": 4, "iou_head_hidden_dim": 64},
}


def mm_grounding_dino(like: DetectorSpec, work: Path) -> DetectorSpec:
    """Return an MM-Grounding-DINO of the sizes and the vocabulary of a Grounding DINO."""
    source = resolve(like, ["*.json", "*.txt"])
    sizes = GroundingDinoConfig.from_pretrained(source).to_dict() | {"model_type": MMGroundingDinoConfig.model_type}

    def write(folder: Path) -> None:
        shutil.copytree(source, folder)
        MMGroundingDinoForObjectDetection(MMGroundingDinoConfig(**sizes)).save_pretrained(folder)

    return DetectorSpec(path=str(written(work / "mm-grounding-dino", write)))


def sam2(work: Path) -> SamSpec:
    """Return a SAM 2 of four million parameters."""

    def write(folder: Path) -> None:
        Sam2Model(Sam2Config(**SAM2)).save_pretrained(folder)
        Sam2Processor(Sam2ImageProcessor(size={"height": SIDE, "width": SIDE})).save_pretrained(folder)

    return SamSpec(path=str(written(work / "sam2", write)))


def written(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return `folder`, made anew by `write` with the same random weights each time."""
    shutil.rmtree(folder, ignore_errors=True)
    with torch.random.fork_rng(devices=[]), no_progress_bar():
        torch.manual_seed(0)
        write(folder)
    return folder.resolve()
