"""Samples the published Stable Diffusion and has the judge classify its images; generates the docs' sample sheet."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from pipelines.toybox import world
from runtime.cli import Parser, guarded
from train.toybox.lessons import data
from train.toybox.loop import loop
from train.toybox.models import judge

FOLDER = Path("weights/toybox/diffusion")
PROMPTS, STEPS, GUIDANCE = 1000, 30, 5.0
SAMPLES = Path("docs/toybox_samples.png")
ASKED = ("family", "colour", "pattern", "scene", "style", "dress")
"""Attributes that captions name and the judge checks."""

SHEET_FAMILIES = ("ball", "box", "can", "cone", "ring", "mug", "mushroom", "duck")
SHEET_PROMPTS = (
    "a photo of a red {} on the beach",
    "a photo of a blue striped {} in the snow",
    "a photo of a yellow {} with purple dots on the grass",
    "a photo of a green two tone {} in the city",
    "a photo of a white {} wearing a hat on a wooden table",
    "a cartoon of a pink {} in front of a brick wall",
)
"""The sample sheet: every family with every prompt, seeds 0, 1, 2, ... in reading order, none omitted."""


def captions(count: int, seed: int, held_out: bool) -> tuple[list[str], NDArray[np.int16]]:
    """Captions of held-out or of the other subjects, and each one's attributes, a row of `data.ATTRIBUTES`."""
    rng, texts, rows = np.random.default_rng(seed), list[str](), list[list[int]]()
    for _ in range(count):
        subject = world.sample_subject(rng, kept=held_out)
        look = world.sample_look(rng, style=0.35, shape=0.1, accessory=0.4, family=subject.family)
        texts.append(world.caption(subject, look))
        rows.append(data.attribute_row((subject, world.sample_view(rng), look)))
    return texts, np.array(rows, np.int16)


def prompts(count: int) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """Captions of held-out subjects, their attributes, and whether each is named (and visible in an image), [count]."""
    texts, table = captions(count, seed=7, held_out=True)
    named = data.visible(table)
    named[:, list(data.ATTRIBUTES).index("dress")] &= table[:, list(data.ATTRIBUTES).index("dress")] > 0
    wanted = {name: torch.from_numpy(table[:, i].astype(np.int64)) for i, name in enumerate(data.ATTRIBUTES)}
    return texts, wanted, {name: torch.from_numpy(named[:, i]) for i, name in enumerate(data.ATTRIBUTES)}


def load_pipeline() -> Any:
    """The saved pipeline, without progress bar, in float32, on the best device."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(loop.best_device())


def paint(pipeline: Any, texts: list[str], first: int, steps: int = STEPS) -> Tensor:
    """Images uint8 [B, 64, 64, 3] of captions, with seeds first, first + 1, ..."""
    seeds = [torch.Generator().manual_seed(first + i) for i in range(len(texts))]
    images = pipeline(
        texts, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=seeds, output_type="np"
    ).images
    return torch.from_numpy((images * 255).round().astype(np.uint8))


def generate(texts: list[str]) -> Tensor:
    """Images uint8 [B, 64, 64, 3] by the saved pipeline, seeds 0, 1, 2, ..."""
    pipeline = load_pipeline()
    starts = tqdm(range(0, len(texts), 40), desc="generate", disable=len(texts) <= 40 or None)
    return torch.cat([paint(pipeline, texts[start : start + 40], start) for start in starts])


@dataclass(frozen=True)
class Painted:
    """Generated images uint8 [B, 64, 64, 3], the attributes of their captions, and the judge's verdicts.

    wanted, named: as returned by `prompts`. seen: the judge's verdicts; masks: bool [B, 64, 64], of the subject.
    """

    images: Tensor
    wanted: dict[str, Tensor]
    named: dict[str, Tensor]
    seen: dict[str, Tensor]
    masks: Tensor


@cache
def painted(count: int) -> Painted:
    """Generate from held-out captions and run the judge; cached, since two measurements use them."""
    texts, wanted, named = prompts(count)
    images = generate(texts)
    return Painted(images, wanted, named, *judge.verdicts(judge.load_judge(), images))


def measure(count: int = PROMPTS) -> dict[str, float]:
    """How often the judge sees what the caption names, per attribute."""
    found = painted(count)
    wanted, named, seen = found.wanted, found.named, found.seen
    return {name: round(float((seen[name] == wanted[name])[named[name]].float().mean()), 4) for name in ASKED}


LESSONS, LESSON_STEPS = 4000, 20
"""Images generated to train the detector, and sampling steps of each."""


def lessons(count: int = LESSONS) -> data.Pictures:
    """Images generated from captions of subjects that are not held out, with the judge's mask as the subject's region.

    Images in which the judge does not see the requested family or shape are dropped. Generated once per text-to-image
    model and count, block by block, in bfloat16 if the machine is fast at it.
    """
    texts, table = captions(count, seed=8, held_out=False)
    stamp = hashlib.sha256((FOLDER / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()[:12]
    folder = data.WORK / "painted" / f"{stamp}-{count}-{LESSON_STEPS}"
    device = loop.best_device()
    folder.mkdir(parents=True, exist_ok=True)
    pipeline, blocks = None, list[NDArray[np.uint8]]()
    for start in range(0, count, 100):
        path = folder / f"{start}.npy"
        if not path.exists():
            pipeline = pipeline or load_pipeline()
            with torch.autocast(device.type, torch.bfloat16, enabled=loop.fast_dtype(device) == torch.bfloat16):
                block = paint(pipeline, texts[start : start + 100], 1_000_000 + start, LESSON_STEPS)
            temporary = path.with_suffix(".tmp.npy")
            np.save(temporary, block.numpy())
            temporary.rename(path)
            print(f"lessons: {start + len(block)} of {count} generated", flush=True)
        blocks.append(np.load(path)[: count - start])
    images = np.concatenate(blocks)
    seen, masks = judge.verdicts(judge.load_judge(), torch.from_numpy(images))
    wanted = {name: table[:, i] for i, name in enumerate(data.ATTRIBUTES)}
    own = wanted["shape"] == data.ATTRIBUTES["shape"].index("own")
    right = (seen["shape"].numpy() == wanted["shape"]) & (~own | (seen["family"].numpy() == wanted["family"]))
    right &= masks.any((1, 2)).numpy()
    spec = replace(data.SETS["pictures"], name="painted", seed=8, subjects=int(right.sum()))
    regions = np.where(masks.numpy(), data.SUBJECT, data.BACKGROUND).astype(np.uint8)
    return data.Pictures(spec, images[right], regions[right], table[right], stamp)


def save_samples(path: Path, scale: int = 2) -> None:
    """Write the sheet: one row per prompt, one column per family."""
    texts = [prompt.format(family) for prompt in SHEET_PROMPTS for family in SHEET_FAMILIES]
    images = generate(texts).numpy()
    side, line = data.SIZE * scale, 18
    sheet = Image.new("RGB", (side * len(SHEET_FAMILIES), (side + line) * len(SHEET_PROMPTS)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, image in enumerate(images):
        row, column = divmod(i, len(SHEET_FAMILIES))
        tile = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(tile, (column * side, row * (side + line) + line))
    for row, prompt in enumerate(SHEET_PROMPTS):
        draw.text((4, row * (side + line) + 1), prompt.format(" / ".join(SHEET_FAMILIES)), fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def main(words: Sequence[str]) -> None:
    parser = Parser(description="Generate the sample sheet with the small Stable Diffusion.")
    parser.add_argument("path", nargs="?", type=Path, default=SAMPLES)
    path = parser.parse_args(words).path
    save_samples(path)
    print(path)


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
