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

from runtime.cli import Parser, guarded
from train.toybox.lessons import data
from train.toybox.lessons.registry import TOYS, WORLDS
from train.toybox.lessons.worlds import World
from train.toybox.loop import loop
from train.toybox.models import judge

PROMPTS, STEPS, GUIDANCE = 1000, 30, 5.0


def folder(world: World) -> Path:
    """Where the pipeline is."""
    return world.weights / "diffusion"


def captions(world: World, count: int, seed: int, held_out: bool) -> tuple[list[str], NDArray[np.int16]]:
    """Captions of held-out or of the other subjects, and each one's attributes, a row of the world's."""
    rng = np.random.default_rng(seed)
    texts, rows = zip(*(world.prompt(rng, held_out) for _ in range(count)), strict=True)
    return list(texts), np.array(rows, np.int16)


def columns(world: World, table: NDArray[Any]) -> dict[str, Tensor]:
    """The columns [B] of a table of attributes by name; indices as int64."""
    kind = table if table.dtype == np.bool_ else table.astype(np.int64)
    return {name: torch.from_numpy(kind[:, i]) for i, name in enumerate(world.attributes)}


def prompts(world: World, count: int) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """Captions of held-out subjects, their attributes, and whether each is named (and visible in an image), [count]."""
    texts, table = captions(world, count, seed=7, held_out=True)
    return texts, columns(world, table), columns(world, world.asked(table))


def load_pipeline(world: World) -> Any:
    """The saved pipeline, without progress bar, in float32, on the best device."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder(world), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(loop.best_device())


def paint(pipeline: Any, texts: list[str], first: int, steps: int = STEPS) -> Tensor:
    """Images uint8 [B, 64, 64, 3] of captions, with seeds first, first + 1, ..."""
    seeds = [torch.Generator().manual_seed(first + i) for i in range(len(texts))]
    images = pipeline(
        texts, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=seeds, output_type="np"
    ).images
    return torch.from_numpy((images * 255).round().astype(np.uint8))


def generate(world: World, texts: list[str]) -> Tensor:
    """Images uint8 [B, 64, 64, 3] by the saved pipeline, seeds 0, 1, 2, ..."""
    pipeline = load_pipeline(world)
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
def painted(world: str, count: int) -> Painted:
    """Generate from held-out captions and run the judge; cached, since two measurements use them."""
    of = WORLDS[world]
    texts, wanted, named = prompts(of, count)
    images = generate(of, texts)
    return Painted(images, wanted, named, *judge.verdicts(judge.load_judge(of), images))


def measure(world: World, count: int = PROMPTS) -> dict[str, float]:
    """How often the judge sees what the caption names, per attribute."""
    found = painted(world.name, count)
    wanted, named, seen = found.wanted, found.named, found.seen
    return {name: round(float((seen[name] == wanted[name])[named[name]].float().mean()), 4) for name in world.painted}


LESSONS, LESSON_STEPS = 4000, 20
"""Images generated to train the detector, and sampling steps of each."""


def lessons(count: int = LESSONS) -> data.Pictures:
    """Images generated from captions of toys that are not held out, with the judge's mask as the subject's region.

    Images in which the judge does not see the requested family or shape are dropped. Generated once per text-to-image
    model and count, block by block, in bfloat16 if the machine is fast at it.
    """
    texts, table = captions(TOYS, count, seed=8, held_out=False)
    stamp = hashlib.sha256((folder(TOYS) / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()[
        :12
    ]
    place = TOYS.work / "painted" / f"{stamp}-{count}-{LESSON_STEPS}"
    device = loop.best_device()
    pipeline, blocks = None, list[NDArray[np.uint8]]()
    for start in range(0, count, 100):
        path = place / f"{start}.npy"
        if not path.exists():
            pipeline = pipeline or load_pipeline(TOYS)
            with torch.autocast(device.type, torch.bfloat16, enabled=loop.fast_dtype(device) == torch.bfloat16):
                block = paint(pipeline, texts[start : start + 100], 1_000_000 + start, LESSON_STEPS)
            data.save_array(path, block.numpy())
            print(f"lessons: {start + len(block)} of {count} generated", flush=True)
        blocks.append(np.load(path)[: count - start])
    images = np.concatenate(blocks)
    seen, masks = judge.verdicts(judge.load_judge(TOYS), torch.from_numpy(images))
    family, shape = (TOYS.column(table, name) for name in ("family", "shape"))
    own = shape == TOYS.attributes["shape"].index("own")
    right = (seen["shape"].numpy() == shape) & (~own | (seen["family"].numpy() == family))
    right &= masks.any((1, 2)).numpy()
    spec = replace(TOYS.sets["pictures"], name="painted", seed=8, subjects=int(right.sum()))
    regions = np.where(masks.numpy(), data.SUBJECT, data.BACKGROUND).astype(np.uint8)
    return data.Pictures(TOYS, spec, images[right], regions[right], table[right], stamp)


def save_samples(world: World, path: Path, scale: int = 2) -> None:
    """Write the sheet: a row per prompt, a column per subject, seeds 0, 1, 2, ... in reading order, none omitted."""
    subjects, asked = world.sheet.subjects, world.sheet.prompts
    texts = [prompt.format(subject) for prompt in asked for subject in subjects]
    images = generate(world, texts).numpy()
    side, line = data.SIZE * scale, 18
    sheet = Image.new("RGB", (side * len(subjects), (side + line) * len(asked)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, image in enumerate(images):
        row, column = divmod(i, len(subjects))
        tile = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(tile, (column * side, row * (side + line) + line))
    for row, prompt in enumerate(asked):
        draw.text((4, row * (side + line) + 1), prompt.format(" / ".join(subjects)), fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def main(words: Sequence[str]) -> None:
    parser = Parser(description="Generate the sample sheet with the small Stable Diffusion.")
    parser.add_argument("path", nargs="?", type=Path, help="default: the world's in docs")
    parser.add_argument("--world", choices=list(WORLDS), default=TOYS.name, help="default: %(default)s")
    options = parser.parse_args(words)
    world = WORLDS[options.world]
    path = options.path or world.sheet.path
    save_samples(world, path)
    print(path)


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
