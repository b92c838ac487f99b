"""A small world of held-out subjects: images, table rows, and models that answer by the mean colour."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from model.backbones.encoders import Encoder
from model.backbones.grounded_sam import Cut, Detection
from tests.world import tables as rows

SIDE = 24
HOSTILE = '<script src="http://evil/x.js">"\'&$x_1$</script>'
TEST_SUBJECTS = {"bench/duck": "duck", "bench/mug": "mug", "bench/ring": "ring"}
COLOURS = {"duck": (230, 180, 20), "mug": (30, 60, 200), "ring": (200, 30, 60)}
PROMPTS = [("scene", "a {class} on a beach"), ("scene", "a {class} in snow"), ("style", "a sketch of a {class}")]


def draw(colour: tuple[int, int, int], shift: int, ground: tuple[int, int, int]) -> tuple[Image.Image, np.ndarray]:
    """Return a square on a ground, and its mask."""
    image, mask = Image.new("RGB", (SIDE, SIDE), ground), Image.new("1", (SIDE, SIDE))
    box = (4 + shift, 5, 13 + shift, 17)
    ImageDraw.Draw(image).rectangle(box, fill=colour)
    ImageDraw.Draw(mask).rectangle(box, fill=1)
    return image, np.asarray(mask)


def frame(frame_id: str, class_name: str, split: str) -> dict[str, Any]:
    """A row of the frames table: a photo of source `photos`."""
    named = {"class_name": class_name, "caption": f"a {class_name}", "noun_end": 2 + len(class_name)}
    file = {"source": "photos", "path": f"{frame_id}.png", "width": SIDE, "height": SIDE, "sha256": "0" * 64}
    return rows.frame(frame_id, **named, **file, split=split, sharpness=9.0)


def mask_row(frame_id: str, mask: np.ndarray, quality: str = "ok", method: str = "annotated") -> dict[str, Any]:
    """A row of the masks table."""
    return rows.mask(frame_id, mask, phrase="thing", method=method, score=0.9, mask_score=0.9, quality=quality)


class FakeModels:
    """Embeds a picture by its mean colour, a text by a fixed direction; finds a subject unless it is drawn in black.

    `calls` counts the pictures that each model was given.
    """

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def count(self, model: str, pictures: Sequence[Any]) -> None:
        self.calls[model] = self.calls.get(model, 0) + len(pictures)

    def encoder(self, name: str) -> Encoder:
        def embed(means: Sequence[torch.Tensor]) -> torch.Tensor:
            self.count(name, means)
            return torch.nn.functional.normalize(torch.stack(list(means)), dim=1)

        return Encoder(name, self.prepare, embed, self.encode_text)

    def encode_text(self, prompts: Sequence[str]) -> torch.Tensor:
        self.count("text", prompts)
        return torch.tensor([[len(prompt) / 100, 0.0, 0.0] for prompt in prompts], dtype=torch.float64)

    def prepare(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image, dtype=np.float64).mean(axis=(0, 1)) + 1)

    def reward(self) -> FakeModels:
        return self

    def rate(self, means: Sequence[torch.Tensor], prompts: Sequence[str]) -> torch.Tensor:
        self.count("reward", means)
        return torch.stack(list(means))[:, 0] - torch.tensor([float(len(prompt)) for prompt in prompts])

    def lpips(self) -> FakeModels:
        return self

    def distances(self, means: Sequence[torch.Tensor]) -> torch.Tensor:
        self.count("lpips", means)
        return torch.cdist(torch.stack(list(means)), torch.stack(list(means)))

    @staticmethod
    def vectors(pictures: Sequence[Image.Image]) -> np.ndarray:
        means = np.array([np.asarray(p, dtype=np.float64).mean(axis=(0, 1)) + 1 for p in pictures])
        return means / np.linalg.norm(means, axis=1, keepdims=True)


class FakeSegmenter:
    """Finds one box in every picture that is not black; answers the last picture first, as batches may."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def prepare(self, image: Image.Image) -> Image.Image:
        return image

    def cut_out(
        self, photos: Iterable[tuple[int, Image.Image, str]], min_score: float
    ) -> Iterator[tuple[int, Detection | None, Cut | None]]:
        for number, image, phrase in reversed(list(photos)):
            self.asked.append(phrase)
            if np.asarray(image).max() <= 20:
                yield number, None, None
                continue
            mask = np.zeros((image.height, image.width), dtype=bool)
            mask[5:18, 4:14] = True
            mask[0, 0] = True  # a speck
            yield number, Detection((4, 5, 14, 18), 0.9), Cut(mask, 0.9)


class FakePainter:
    """Draws the class noun's square, its place and ground by the seed; counts what it was asked for."""

    def __init__(self, die_after: int | None = None) -> None:
        self.calls: list[SimpleNamespace] = []
        self.die_after = die_after

    def __call__(self, segments: Any, class_names: Sequence[str], prompts: Sequence[str], seeds: Any) -> list[Any]:
        if self.die_after is not None and len(self.calls) >= self.die_after:
            raise KeyboardInterrupt
        self.calls.append(SimpleNamespace(class_names=list(class_names), prompts=list(prompts), seeds=list(seeds)))
        grounds = [np.random.default_rng(seed).integers(0, 255, 3) for seed in seeds]
        colour = COLOURS[class_names[0]]
        return [draw(colour, int(g[0]) % 5, (int(g[0]), int(g[1]), int(g[2])))[0] for g in grounds]
