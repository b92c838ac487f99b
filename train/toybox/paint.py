"""Paints with the published Stable Diffusion folder and asks the judge what it sees."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from pipelines.toybox import world
from train.toybox import data, judge, loop

FOLDER = Path("weights/toybox/diffusion")
PROMPTS, STEPS, GUIDANCE = 240, 25, 3.0
SHEET = data.WORK / "samples.png"
ASKED = ("scene", "colour", "family", "pattern")
"""Attributes that the prompts name."""


def prompts(count: int) -> tuple[list[str], dict[str, Tensor]]:
    """Captions of held-out subjects as bare photos, and what each of them asks for."""
    rng, said, rows = np.random.default_rng(7), [], []
    for _ in range(count):
        subject = world.sample_subject(rng, kept=True)
        look = world.sample_look(rng)
        said.append(world.caption(subject, look))
        rows.append(data.attribute_row((subject, world.sample_view(rng), look)))
    table = torch.tensor(rows)
    return said, {name: table[:, i] for i, name in enumerate(data.ATTRIBUTES)}


def generate(said: list[str], steps: int = STEPS, guidance: float = GUIDANCE) -> Tensor:
    """Pictures uint8 [B, 64, 64, 3] by the saved pipeline, one seed each."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(loop.best_device())
    parts = []
    for start in range(0, len(said), 40):
        group = said[start : start + 40]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(group))]
        drawn = pipeline(
            group, num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="np"
        ).images
        parts.append(torch.from_numpy((drawn * 255).round().astype(np.uint8)))
    return torch.cat(parts)


def save_sheet(images: Tensor, path: Path, across: int = 12) -> None:
    """Write pictures as one sheet, doubled in size."""
    rows = [torch.cat(list(images[i : i + across]), 1) for i in range(0, len(images), across)]
    sheet = Image.fromarray(torch.cat(rows).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path)


def measure() -> dict[str, float]:
    """How often the judge sees the scene, colour, family and pattern that the prompt asked for; writes `SHEET`."""
    said, asked = prompts(PROMPTS)
    images = generate(said)
    save_sheet(images[:96], SHEET)
    seen = judge.verdicts(judge.load_judge(), images)
    return {name: round(float((seen[name] == asked[name]).float().mean()), 4) for name in ASKED}
