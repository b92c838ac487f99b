"""Synthetic images and photos: an ellipse on noise, so that decoding takes work."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from eval.protocol import protocol
from eval.score import metrics
from eval.score.segmentation import Row
from pipelines import tables
from pipelines.photos.roots import Roots, SourceParams

CLASS = "mug"


def draw(seed: int, side: int) -> tuple[Image.Image, np.ndarray]:
    """Return an image, `side` px wide and high, and the mask of its ellipse."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (side // 4 + 1, side // 4 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
    mask = Image.new("L", (side, side))
    left, upper = (int(value) for value in rng.integers(0, side // 4, 2))
    box = (left, upper, left + side // 2, upper + side // 2 + side // 8)
    ImageDraw.Draw(image).ellipse(box, fill=tuple(int(value) for value in rng.integers(0, 256, 3)))
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return image, np.asarray(mask) > 0


def png(image: Image.Image) -> bytes:
    """Return the bytes of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def subject(number: int, photos: int, side: int, folder: Path) -> protocol.HeldOutSubject:
    """Return a subject with masks, its photos written into `folder`."""
    subject_id = f"bench/{number:03d}"
    found = []
    for index in range(photos):
        image, mask = draw(1000 * number + index, side)
        path = f"{subject_id}/{index:02d}.png"
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))
        row: dict[str, Any] = {"rle": tables.encode_mask(mask), "height": side, "width": side, "quality": "ok"}
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        found.append(protocol.HeldOutPhoto(path.removesuffix(".png"), "bench", path, digest, row))
    return protocol.HeldOutSubject(subject_id, CLASS, tuple(found))


def generations(of: protocol.HeldOutSubject, pictures: int, seeds: int, side: int) -> list[Row]:
    """Return rows of the generations table: `pictures` of a subject, `seeds` of each prompt."""
    rows = []
    for number in range(pictures):
        prompt_id, index = divmod(number, seeds)
        image, _ = draw(500_000 + hash_of(of.subject_id, number), side)
        rows.append(
            {
                "method": metrics.MODEL,
                "subject_id": of.subject_id,
                "class_name": of.class_name,
                "group": "scene",
                "prompt_id": prompt_id,
                "prompt": f"a {of.class_name} on a table, number {prompt_id}",
                "index": index,
                "reference": of.photos[0].frame_id,
                "image": png(image),
            }
        )
    return rows


def hash_of(subject_id: str, number: int) -> int:
    """Return an image's seed, 0..9999."""
    return int(hashlib.sha256(f"{subject_id}/{number}".encode()).hexdigest(), 16) % 10_000


def roots(folder: Path) -> Roots:
    """Return the roots of the photos that `subject` wrote."""
    return Roots([SourceParams(name="bench", layout="folder", root=str(folder), split="test")])
