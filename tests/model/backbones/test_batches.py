"""Eight photos give the same bits together, alone, in another order and with one more, in every model of the stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import squeezenet1_1

from model.backbones.clip import load_clip
from model.backbones.diffusion import load_vae
from model.backbones.grounded_sam import GroundedSam, load_grounded_sam
from model.backbones.perceptual import load_perceptual
from model.backbones.reward import load_reward
from model.backbones.variant import LpipsSpec, load_variant
from model.backbones.vision import load_dino
from model.images.inputs import encode_latents

NOUNS = ["mug", "bowl", "car", "lamp", "mug", "boat", "bottle", "chair"]
PROMPTS = [f"a photo of a {noun} on the {place}" for noun, place in zip(NOUNS, ["beach", "table"] * 4, strict=True)]
Rows = Callable[[Sequence[int]], list[Any]]
"""Results of the photos with these numbers, comparable by ==."""


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    """Nine photos of a box before a gradient, in colours and contrasts of their own."""
    draw = np.random.default_rng(0)
    photos = []
    for _ in range(9):
        start, end, colour = draw.integers(0, 256, (3, 3))
        ramp = np.linspace(start, end, 64)[:, None].repeat(64, 1) + draw.normal(0, 12, (64, 64, 3))
        left, top, width, height = draw.integers(6, 30, 4)
        ramp[top : top + height, left : left + width] = colour
        photos.append(Image.fromarray(ramp.clip(0, 255).astype(np.uint8)))
    return photos


@pytest.fixture(scope="module")
def masks() -> GroundedSam:
    variant = load_variant("toybox")
    return load_grounded_sam(variant.detector, variant.sam, "cpu", batch_size=8)


def comparable(rows: Any) -> list[bytes]:
    return [np.ascontiguousarray(row).tobytes() for row in rows]


def models(name: str, scenes: list[Image.Image], masks: GroundedSam) -> Rows:
    """The model `name` over some of `scenes`."""
    variant = load_variant("toybox")
    nouns, prompts = [*NOUNS, "mug"], [*PROMPTS, "a mug"]
    assert variant.reward is not None

    def chosen(rows: Sequence[int]) -> list[Image.Image]:
        return [scenes[row] for row in rows]

    if name == "detector":
        return lambda rows: masks.detect(chosen(rows), [nouns[row] for row in rows])
    if name == "sam":
        box = (8.0, 8.0, 40.0, 50.0)
        return lambda rows: [
            (mask.tobytes(), score) for mask, score in zip(*masks.segment(chosen(rows), [box] * len(rows)), strict=True)
        ]
    if name == "reward":
        reward = load_reward(variant.reward, "cpu", batch_size=8)
        prepare = reward.prepare
        return lambda rows: comparable(reward.rate([prepare(p) for p in chosen(rows)], [prompts[row] for row in rows]))
    if name == "vae":
        vae = load_vae(variant.diffusion, torch.float32, "cpu")
        return lambda rows: comparable(encode_latents(vae, chosen(rows), 8, "cpu"))
    if name == "dino":
        dino = load_dino(variant.dino, "cpu", batch_size=8)
        return lambda rows: comparable(dino.encode_image(chosen(rows)))
    clip = load_clip(variant.clip, "cpu", batch_size=8)
    if name == "clip image":
        return lambda rows: comparable(clip.encode_image(chosen(rows)))
    if name == "clip text":
        return lambda rows: comparable(clip.encode_text([prompts[row] for row in rows]))
    assert name == "clip hidden states"
    return lambda rows: comparable(clip.hidden_states(chosen(rows), variant.image_encoder.layers))


@pytest.mark.parametrize(
    "name", ["detector", "sam", "clip image", "clip text", "clip hidden states", "dino", "vae", "reward"]
)
def test_eight_photos_give_the_same_bits_together_and_alone(
    name: str, scenes: list[Image.Image], masks: GroundedSam
) -> None:
    rows = models(name, scenes, masks)
    together = rows(range(8))
    assert len(set(together)) > 1
    assert [rows([row])[0] for row in range(8)] == together
    assert rows(range(7, -1, -1))[::-1] == together
    assert rows(range(9))[:8] == together
    assert rows(range(3, 9))[:5] == together[3:]


def test_lpips_of_two_images_does_not_depend_on_the_others(tmp_path: Path, scenes: list[Image.Image]) -> None:
    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), tmp_path / "net.pth")
    model = load_perceptual(LpipsSpec(path=str(tmp_path / "net.pth"), net="squeeze"), "cpu", batch_size=8)
    prepared = [model.prepare(scene) for scene in scenes]
    together = model.distances(prepared)
    for first, second in ((0, 1), (2, 7), (6, 8)):
        assert model.distances([prepared[first], prepared[second]])[0, 1] == together[first, second]
