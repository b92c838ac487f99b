"""A base model, detector, recogniser and CLIP that are told what to see by the name; Ray's workers import it by name.

A picture is one colour: red holds whose face it is, green what else is in it, blue the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from model.backbones.segmenters.detection import Detection
from model.backbones.variant import Variant
from pipelines.selfaugment.people import SelfAugmentParams
from pipelines.selfaugment.worker import SelfAugmentModels, SelfAugmentWorker

SIDE = 8
KNOWN = {"Ada Known": 40, "Bob Known": 80, "Cy Known": 120, "Dee Known": 160}
"""The red of people whom the base model knows; of a stranger it follows the seed."""
FACELESS, CROWD, STRANGER = "a castle", "a beach", "a suit"
"""Words of prompts that show no face, two, or another's."""


def sample(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """Pictures of these prompts."""
    images = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        red = next((red for name, red in KNOWN.items() if name in prompt), seed % 250)
        red = (red + 125) % 250 if STRANGER in prompt else red
        kind = 1 if FACELESS in prompt else 2 if CROWD in prompt else 0
        images.append(Image.new("RGB", (SIDE, SIDE), (red, kind, seed % 256)))
    return images


def detect(images: Sequence[Image.Image], phrases: Sequence[str]) -> list[Detection | None]:
    """The whole picture, if there is a face."""
    assert set(phrases) == {"face"}
    kinds = [image.getpixel((0, 0))[1] for image in images]  # type: ignore[index]
    return [None if kind == 1 else Detection((0, 0, SIDE, SIDE), 0.9, 0.6 if kind == 2 else 0.1) for kind in kinds]


def face(crops: Sequence[Image.Image]) -> np.ndarray:
    """A unit vector that turns with the red of the middle."""
    reds = np.array([crop.getpixel((crop.width // 2, crop.height // 2))[0] for crop in crops])  # type: ignore[index]
    angles = reds / 125 * np.pi
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32).reshape(-1, 2)


def clip_t(images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
    """By the seed, so that pictures of a prompt differ."""
    return np.array([image.getpixel((0, 0))[2] / 256 for image in images], dtype=np.float32)  # type: ignore[index]


def load_fakes(params: SelfAugmentParams, variant: Variant, device: str) -> SelfAugmentModels:
    """Models without weights."""
    return SelfAugmentModels(sample, detect, face, clip_t, {"base_model": "fake@0"})


def fake_worker(params: SelfAugmentParams, variant: str, device: str) -> Any:
    """The stage's worker with these models."""
    return SelfAugmentWorker(params, variant, device, load_fakes)
