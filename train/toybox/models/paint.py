"""Paints with the published Stable Diffusion and asks the judge what it sees; paints the docs' sheet of samples."""

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
"""Attributes that captions name and the judge looks for."""

SHEET_FAMILIES = ("ball", "box", "can", "cone", "ring", "mug", "mushroom", "duck")
SHEET_PROMPTS = (
    "a photo of a red {} on the beach",
    "a photo of a blue striped {} in the snow",
    "a photo of a yellow {} with purple dots on the grass",
    "a photo of a green two tone {} in the city",
    "a photo of a white {} wearing a hat on a wooden table",
    "a cartoon of a pink {} in front of a brick wall",
)
"""The sheet of samples: every family with every prompt, seeds 0, 1, 2, ... in reading order, none left out."""


def captions(count: int, seed: int, held_out: bool) -> tuple[list[str], NDArray[np.int16]]:
    """Captions of held-out or of the other subjects, and what each asks for, a row of `data.ATTRIBUTES`."""
    rng, said, rows = np.random.default_rng(seed), list[str](), list[list[int]]()
    for _ in range(count):
        subject = world.sample_subject(rng, kept=held_out)
        look = world.sample_look(rng, style=0.35, shape=0.1, accessory=0.4, family=subject.family)
        said.append(world.caption(subject, look))
        rows.append(data.attribute_row((subject, world.sample_view(rng), look)))
    return said, np.array(rows, np.int16)


def prompts(count: int) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """Captions of held-out subjects, what each asks for, and whether it asks (and a picture could show it), [count]."""
    said, table = captions(count, seed=7, held_out=True)
    named = data.visible(table)
    named[:, list(data.ATTRIBUTES).index("dress")] &= table[:, list(data.ATTRIBUTES).index("dress")] > 0
    wanted = {name: torch.from_numpy(table[:, i].astype(np.int64)) for i, name in enumerate(data.ATTRIBUTES)}
    return said, wanted, {name: torch.from_numpy(named[:, i]) for i, name in enumerate(data.ATTRIBUTES)}


def load_pipeline() -> Any:
    """The saved pipeline, silent, in float32, on the best device."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(loop.best_device())


def paint(pipeline: Any, said: list[str], first: int, steps: int = STEPS) -> Tensor:
    """Pictures uint8 [B, 64, 64, 3] of captions, with the seeds first, first + 1, ..."""
    seeds = [torch.Generator().manual_seed(first + i) for i in range(len(said))]
    drawn = pipeline(said, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=seeds, output_type="np").images
    return torch.from_numpy((drawn * 255).round().astype(np.uint8))


def generate(said: list[str]) -> Tensor:
    """Pictures uint8 [B, 64, 64, 3] by the saved pipeline, seeds 0, 1, 2, ..."""
    pipeline = load_pipeline()
    starts = tqdm(range(0, len(said), 40), desc="paint", disable=len(said) <= 40 or None)
    return torch.cat([paint(pipeline, said[start : start + 40], start) for start in starts])


@dataclass(frozen=True)
class Painted:
    """Generated pictures uint8 [B, 64, 64, 3], what their captions asked for, and what the judge sees in them.

    wanted, named: as `prompts` gives them. seen: the judge's verdicts; masks: bool [B, 64, 64], of the subject.
    """

    images: Tensor
    wanted: dict[str, Tensor]
    named: dict[str, Tensor]
    seen: dict[str, Tensor]
    masks: Tensor


@cache
def painted(count: int) -> Painted:
    """Generate from held-out captions and ask the judge; kept, since two measurements need them."""
    said, wanted, named = prompts(count)
    images = generate(said)
    return Painted(images, wanted, named, *judge.verdicts(judge.load_judge(), images))


def measure(count: int = PROMPTS) -> dict[str, float]:
    """How often the judge sees what the caption names, attribute by attribute."""
    found = painted(count)
    wanted, named, seen = found.wanted, found.named, found.seen
    return {name: round(float((seen[name] == wanted[name])[named[name]].float().mean()), 4) for name in ASKED}


LESSONS, LESSON_STEPS = 4000, 20
"""Pictures painted for the detector to learn from, and in how many steps."""


def lessons(count: int = LESSONS) -> data.Pictures:
    """Pictures painted from captions of subjects that are not held out, with the judge's mask as the subject's region.

    Those in which the judge does not see the family or the shape asked for are left out. Painted once for each
    text-to-image model and count, block by block, in bfloat16 where the machine is fast at it.
    """
    said, table = captions(count, seed=8, held_out=False)
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
                drawn = paint(pipeline, said[start : start + 100], 1_000_000 + start, LESSON_STEPS)
            temporary = path.with_suffix(".tmp.npy")
            np.save(temporary, drawn.numpy())
            temporary.rename(path)
            print(f"lessons: {start + len(drawn)} of {count} painted", flush=True)
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
    """Write the sheet: a row for each prompt, a column for each family."""
    said = [prompt.format(family) for prompt in SHEET_PROMPTS for family in SHEET_FAMILIES]
    images = generate(said).numpy()
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
    parser = Parser(description="Paint the sheet of samples with the small Stable Diffusion.")
    parser.add_argument("path", nargs="?", type=Path, default=SAMPLES)
    path = parser.parse_args(words).path
    save_samples(path)
    print(path)


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
