"""The effect of sharing S+ between neighbouring sampling steps on images: `python -m experiments.sharing`.

Samples held-out subjects of the toybox with `text_every` 1, 2, 5 and so on from the same noise, prints each one's
difference from the images of 1 and its time, and writes them as a sheet, one row per subject.
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
from model.backbones.diffusion import load_diffusion
from model.backbones.features.source import feature_source
from model.backbones.variant import variant_of
from model.images.segment import on_white
from model.pipeline.pipeline import CustomContrastPipeline, build_pipeline
from model.sampler import READY
from pipelines.toybox.stage import ToyboxParams
from pipelines.toybox.world import render
from runtime.cli import Parser, guarded, read_params, shared_options
from runtime.errors import UserError
from runtime.timing import turns

PROMPTS = (
    "a photo of a {} on the beach",
    "a photo of a {}",
    "a photo of a {} in the snow",
    "a photo of a {} in a forest",
)
"""One per subject, in turn."""
ZOOM = 2
"""Pixels of the sheet per pixel of a 64 px image."""
HEAD = 14
"""Height in pixels of the sheet's header, which names the columns."""


def references(world: ToyboxParams, count: int) -> tuple[list[str], list[Image.Image], list[Image.Image]]:
    """Class nouns, first photos and their segments on white of `count` held-out subjects."""
    firsts = [photos[0] for _, photos in people(world.model_copy(update={"dreambench_subjects": count})).values()]
    rendered = render(firsts)
    photos = [Image.fromarray(image) for image in rendered.images.numpy()]
    pairs = zip(photos, rendered.subject_masks.numpy(), strict=True)
    cuts = [on_white(photo, mask, margin=0.05) for photo, mask in pairs]
    return [subject.family for subject, _, _ in firsts], photos, cuts


def build(folder: Path) -> CustomContrastPipeline:
    """The pipeline of an adapter trained on the toybox.

    Raises:
        UserError: it was trained on other backbones.
    """
    config, _ = read_description(folder)
    variant = variant_of(config.base_model)
    if variant is None or variant.name != "toybox":
        raise UserError(f"{folder} is of base model '{config.base_model}'; give an adapter of the toybox")
    diffusion = load_diffusion(variant.diffusion, torch.float32, "cpu")
    adapter = Adapter.load(folder, diffusion.name, diffusion.revision).eval()
    pipeline = build_pipeline(diffusion, adapter, feature_source(variant, config.encoder).load("cpu"), variant)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: CustomContrastPipeline, nouns: Sequence[str], cuts: Sequence[Image.Image], seed: int, **settings: Any
) -> np.ndarray:
    """One image per subject, uint8 [subjects, H, W, 3]."""
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
    """Root mean squared difference, in 8-bit levels."""
    return float(np.sqrt(((a.astype(np.float32) - b) ** 2).mean()))


def sheet(columns: Sequence[np.ndarray], names: Sequence[str]) -> Image.Image:
    """The images side by side, with column names on top."""
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
    parser.add_argument(
        "--adapter", type=Path, default=READY, help="adapter trained on the toybox (default: %(default)s)"
    )
    parser.add_argument("--subjects", type=int, default=4, help="images per column (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--every",
        type=int,
        nargs="+",
        default=[2, 5, 50],
        help="values of text_every to compare with 1 (default: 2 5 50)",
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="timing repeats, of which the median counts (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/sharing.png"), help="file of the sheet (default: %(default)s)"
    )
    shared_options(parser)
    options = parser.parse_args(words)
    if min(options.subjects, options.steps, options.repeats, *options.every) < 1:
        raise UserError("--subjects, --steps, --every and --repeats must be at least 1")
    pipeline = build(options.adapter)
    world = read_params(options).section("toybox", ToyboxParams)
    nouns, _, cuts = references(world, options.subjects)

    def pictures(every: int, seed: int = 0) -> np.ndarray:
        return draw(pipeline, nouns, cuts, seed, num_inference_steps=options.steps, text_every=every)

    columns = {every: pictures(every) for every in (1, *options.every)}
    times = turns([partial(pictures, every) for every in columns], options.repeats)
    print(f"{options.subjects} images, {options.steps} steps; difference from text_every 1 in 8-bit levels\n")
    print("| text_every | relative time per image | difference |\n|---|---|---|")
    for place, (every, images) in enumerate(columns.items()):
        time = statistics.median(row[place] / row[0] for row in times)
        print(f"| {every} | {time:.2f} | {difference(images, columns[1]):.1f} |")
    print(f"| another seed | | {difference(pictures(1, seed=1000), columns[1]):.1f} |")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(list(columns.values()), [f"text_every {every}" for every in columns]).save(options.out)
    print(f"\nsharing: {options.out}")


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
