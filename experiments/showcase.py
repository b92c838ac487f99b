"""One photo of a subject -> images of it, as a sheet of the README: `make showcase`.

A row for each of the first held-out subjects of the toybox, with the first photo and the first seed: nothing is chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from experiments.sharing import build, references
from model.sampler import READY
from pipelines.toybox.prompts import Answer, prompt
from pipelines.toybox.stage import ToyboxParams
from runtime.cli import Parser, guarded, read_params, shared_options
from runtime.errors import UserError

COLUMNS = {
    "on the beach": Answer(scene="beach"),
    "in the snow": Answer(scene="snow"),
    "wearing a hat": Answer(accessory="hat"),
    "ring shaped": Answer(shape="ring"),
    "sketch": Answer(style="sketch"),
}
"""Title of a column -> what its prompts ask for."""
GUIDANCE = 5.0
"""As in params.yaml, `generate.guidance_scale`."""
TILE, GAP, HEAD = 128, 6, 24
"""Side of an image on the sheet, space between two, and height of the titles, in pixels."""


def sheet(photos: Sequence[Image.Image], rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """The photos in the first column, their images in the others, with titles on top."""
    width = (len(titles) + 1) * (TILE + GAP) + 3 * GAP
    page = Image.new("RGB", (width, HEAD + len(rows) * (TILE + GAP)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    lefts = [GAP + place * (TILE + GAP) + (2 * GAP if place else 0) for place in range(len(titles) + 1)]
    for left, title in zip(lefts, ("one photo", *titles), strict=True):
        pen.text((left + TILE / 2, HEAD / 2), title, fill="black", font=font, anchor="mm")
    for number, (photo, images) in enumerate(zip(photos, rows, strict=True)):
        for left, image in zip(lefts, (photo, *images), strict=True):
            page.paste(image.resize((TILE, TILE), Image.Resampling.BICUBIC), (left, HEAD + number * (TILE + GAP)))
    return page


def main(words: Sequence[str]) -> None:
    parser = Parser(prog="python -m experiments.showcase", description=__doc__)
    parser.add_argument("--adapter", type=Path, default=READY, help="adapter of the toybox (default: %(default)s)")
    parser.add_argument("--subjects", type=int, default=4, help="rows of the sheet (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/showcase.png"), help="file (default: %(default)s)")
    shared_options(parser)
    options = parser.parse_args(words)
    if min(options.subjects, options.steps) < 1:
        raise UserError("--subjects and --steps must be at least 1")
    pipeline = build(options.adapter)
    world = read_params(options).section("toybox", ToyboxParams)
    nouns, photos, cuts = references(world, options.subjects)
    rows = []
    for noun, cut in zip(nouns, cuts, strict=True):
        prompts = [prompt(answer, noun) for answer in COLUMNS.values()]
        noise = [torch.Generator().manual_seed(0) for _ in prompts]
        settings = {"num_inference_steps": options.steps, "guidance_scale": GUIDANCE}
        images, *_ = pipeline(prompts, cut, noun, generator=noise, return_dict=False, **settings)
        rows.append(images)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet([Image.fromarray(np.asarray(photo)) for photo in photos], rows, list(COLUMNS)).save(options.out)
    print(f"showcase: {options.out}")


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
