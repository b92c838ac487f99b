"""What it does to a picture when neighbouring sampling steps share their S+: `python -m experiments.sharing`.

Draws held-out subjects of the toybox with `text_every` 1, 2, 5 and so on from the same noise, prints how far each is
from the picture of 1 and what it saves, and writes them as a sheet, a row for each subject.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from experiments.truth import people
from model.adapter import Adapter, read_description
from model.backbones.clip import load_clip
from model.backbones.diffusion import load_diffusion
from model.backbones.variant import variant_of
from model.images.segment import on_white
from model.pipeline.pipeline import CustomContrastPipeline, build_pipeline
from model.sample import READY
from pipelines.toybox.render import render
from pipelines.toybox.stage import ToyboxParams
from runtime.cli import Parser, guarded, read_params, shared_options
from runtime.errors import UserError
from runtime.timing import turns

PROMPTS = (
    "a photo of a {} on the beach",
    "a photo of a {}",
    "a photo of a {} in the snow",
    "a photo of a {} in a forest",
)
"""Of the subjects in turn."""
ZOOM = 2
"""Pixels of the sheet for one of a 64 px picture."""
HEAD = 14
"""Pixels of the sheet's first line, which names the columns."""


def references(world: ToyboxParams, count: int) -> tuple[list[str], list[Image.Image]]:
    """Class noun and segment on white of the first photo of `count` held-out subjects."""
    firsts = [photos[0] for _, photos in people(world.model_copy(update={"dreambench_subjects": count})).values()]
    drawn = render(firsts)
    pairs = zip(drawn.images.numpy(), drawn.subject_masks.numpy(), strict=True)
    cuts = [on_white(Image.fromarray(image), mask, margin=0.05) for image, mask in pairs]
    return [subject.family for subject, _, _ in firsts], cuts


def build(folder: Path) -> CustomContrastPipeline:
    """The pipeline of an adapter that was trained on the toybox.

    Raises:
        UserError: it was trained on other backbones.
    """
    config, _ = read_description(folder)
    variant = variant_of(config.base_model)
    if variant is None or variant.name != "toybox":
        raise UserError(f"{folder} is of base model '{config.base_model}'; give an adapter of the toybox")
    diffusion = load_diffusion(variant.diffusion, torch.float32, "cpu")
    adapter = Adapter.load(folder, diffusion.name, diffusion.revision).eval()
    pipeline = build_pipeline(diffusion, adapter, load_clip(variant.image_encoder, "cpu"), variant)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: CustomContrastPipeline, nouns: Sequence[str], cuts: Sequence[Image.Image], seed: int, **settings: Any
) -> np.ndarray:
    """A picture of each subject, uint8 [subjects, H, W, 3]."""
    images = []
    for number, (noun, cut) in enumerate(zip(nouns, cuts, strict=True)):
        generator = torch.Generator().manual_seed(seed + number)
        prompt = PROMPTS[number % len(PROMPTS)].format(noun)
        found, *_ = pipeline(
            prompt, [cut], noun, generator=generator, guidance_scale=5.0, return_dict=False, **settings
        )
        images += found
    return np.stack([np.asarray(image) for image in images])


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Root of the mean squared difference, in 8-bit levels."""
    return float(np.sqrt(((a.astype(np.float32) - b) ** 2).mean()))


def sheet(columns: Sequence[np.ndarray], names: Sequence[str]) -> Image.Image:
    """The pictures side by side, columns named above."""
    rows = np.concatenate([np.concatenate(list(column), axis=0) for column in columns], axis=1)
    grid = Image.fromarray(rows)
    grid = grid.resize((grid.width * ZOOM, grid.height * ZOOM), Image.Resampling.NEAREST)
    page = Image.new("RGB", (grid.width, grid.height + HEAD), "white")
    page.paste(grid, (0, HEAD))
    pen, width = ImageDraw.Draw(page), grid.width // len(columns)
    for place, name in enumerate(names):
        pen.text((place * width + 4, 1), name, fill="black")
    return page


def main(words: Sequence[str]) -> None:
    parser = Parser(prog="python -m experiments.sharing", description=__doc__)
    parser.add_argument("--adapter", type=Path, default=READY, help="of the toybox (default: %(default)s)")
    parser.add_argument("--subjects", type=int, default=4, help="pictures of each column (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler (default: %(default)s)")
    parser.add_argument(
        "--every",
        type=int,
        nargs="+",
        default=[2, 5, 50],
        help="steps that share, compared with 1 (default: all of these)",
    )
    parser.add_argument("--repeats", type=int, default=1, help="the median time counts (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/sharing.png"), help="the sheet (default: %(default)s)")
    shared_options(parser)
    options = parser.parse_args(words)
    if min(options.subjects, options.steps, options.repeats, *options.every) < 1:
        raise UserError("--subjects, --steps, --every and --repeats are numbers from 1 up")
    pipeline = build(options.adapter)
    world = read_params(options).section("toybox", ToyboxParams)
    nouns, cuts = references(world, options.subjects)

    def pictures(every: int, seed: int = 0) -> np.ndarray:
        return draw(pipeline, nouns, cuts, seed, num_inference_steps=options.steps, text_every=every)

    columns = {every: pictures(every) for every in (1, *options.every)}
    times = turns([partial(pictures, every) for every in columns], options.repeats)
    print(f"{options.subjects} pictures, {options.steps} steps; difference from text_every 1 in 8-bit levels\n")
    print("| text_every | time of a picture | difference |\n|---|---|---|")
    for place, (every, images) in enumerate(columns.items()):
        time = statistics.median(row[place] / row[0] for row in times)
        print(f"| {every} | {time:.2f} | {difference(images, columns[1]):.1f} |")
    print(f"| another seed | | {difference(pictures(1, seed=1000), columns[1]):.1f} |")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(list(columns.values()), [f"text_every {every}" for every in columns]).save(options.out)
    print(f"\nsharing: {options.out}")


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
