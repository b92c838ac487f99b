"""Photos for the benchmark: synthetic ones, created once in its work folder, or a folder of real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.data.setting import DataSetting
from pipelines.photos.roots import SourceParams
from pipelines.sources import Subject, open_source

VIEWS = 8
QUALITY = 90  # JPEG quality, as in phone photos and MVImgNet's frames


def source(setting: DataSetting) -> SourceParams:
    """Return the photos of parts that decode: `sizes.source`, or synthetic ones of `sizes.side` px."""
    sizes = setting.sizes
    if sizes.source is not None:
        return SourceParams(name="bench", layout="mvimgnet", root=sizes.source, split="train")
    return drawn(sizes.work, sizes.photos, (sizes.side, sizes.side * 3 // 4))


def drawn(work: Path, count: int, size: tuple[int, int]) -> SourceParams:
    """Return `count` synthetic photos with masks, `VIEWS` per subject, in the `folder` layout."""
    root = work / f"photos-{count}-{size[0]}x{size[1]}"
    complete = root / ".complete"
    if not complete.exists():
        for number in range(count):
            folder = root / "ball" / f"{number // VIEWS:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            image, mask = draw(number, size)
            image.save(folder / f"{number % VIEWS:03d}.jpg", quality=QUALITY)
            mask.save(folder / f"{number % VIEWS:03d}.mask.png")
        complete.touch()
    return SourceParams(name="bench", layout="folder", root=str(root), split="train")


def draw(number: int, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """Return a photo and its mask: a ball on a background, both with fine grain to give JPEG work to do."""
    rng = np.random.default_rng(number)
    width, height = size
    coarse = Image.fromarray(rng.integers(40, 216, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    box = [width * 0.25 + rng.integers(width // 8), height * 0.2, width * 0.7, height * 0.85]
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    ball = Image.new("RGB", size, tuple(int(v) for v in rng.integers(0, 256, 3)))
    flat = np.asarray(Image.composite(ball, coarse, mask), dtype=np.int16)
    grain = rng.normal(0, 6, (height, width, 1)).astype(np.int16)
    return Image.fromarray((flat + grain).clip(0, 255).astype(np.uint8)), mask


def subjects(chosen: SourceParams, photos: int) -> list[Subject]:
    """Return the first subjects of a source that have `photos` photos or a few more in total."""
    result: list[Subject] = []
    for subject in open_source(chosen).subjects():
        if sum(len(s.photos) for s in result) >= photos:
            break
        result.append(subject)
    return result
