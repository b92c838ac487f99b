"""Sheets of pictures at fixed seeds while training: what the adapter makes of subjects from their cached features."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from model.adapter import Adapter
from model.backbones.diffusion import Diffusion
from model.objective import TrainingBatch
from model.pipeline.pipeline import CustomContrastPipeline, build_pipeline
from model.prompt import noun_ends
from runtime.errors import UserError
from train.recipe import PicturesParams

GAP = 2  # px between pictures


@dataclass(frozen=True)
class Sitter:
    """A subject that is drawn: a row of a sheet."""

    noun: str
    prompts: list[str]
    """Its target's caption, then those of the params."""
    features: Tensor
    """[1, K, N, d] of its reference."""
    target: Tensor
    """[1, C, h, w] latent of its target, multiplied by the VAE's scaling factor."""


@dataclass(frozen=True)
class Samples:
    """Draws sheets: a row for each subject, its target as the VAE shows it, then a picture for each prompt.

    Nothing is drawn from the global random numbers and no weight is touched, so that a run with sheets trains what one
    without does. The backbone is used as it is, so one process draws while others wait.
    """

    params: PicturesParams
    sitters: list[Sitter]
    pipeline: CustomContrastPipeline
    folder: Path

    @classmethod
    def of(
        cls,
        params: PicturesParams,
        diffusion: Diffusion,
        adapter: Adapter,
        batch: TrainingBatch,
        folder: Path,
    ) -> Self:
        """Sheets in `folder`/samples of the first subjects of a batch, by adapters of the size of `adapter`.

        Raises:
            ModelError: a prompt lacks the subject's class noun.
            UserError: a picture would take more steps than the diffusion process has.
        """
        timesteps = cast(Any, diffusion.scheduler).config.num_train_timesteps
        if params.steps > timesteps:
            raise UserError(
                f"train.pictures.steps is {params.steps}, and the base model was trained on {timesteps} timesteps; give"
                " at most as many"
            )
        with torch.random.fork_rng(devices=[]):  # a new adapter draws its first weights
            copy = Adapter(adapter.config).to(adapter.device, adapter.dtype).eval().requires_grad_(False)
        pipeline = build_pipeline(diffusion, copy)
        pipeline.set_progress_bar_config(disable=True)
        count = min(params.subjects, len(batch.captions))
        return cls(params, [sitter(params, batch, row) for row in range(count)], pipeline, folder / "samples")

    @torch.no_grad()
    def draw(self, weights: dict[str, Tensor], steps: int) -> str:
        """Draw the sheet of an adapter's weights after so many steps; return its file, below the run's folder."""
        self.pipeline.adapter.load_state_dict(weights)
        rows = [self.row(sitter) for sitter in self.sitters]
        file = self.folder / f"step-{steps:06d}.png"
        settings = {"steps": steps, "seed": self.params.seed, "prompts": [sitter.prompts for sitter in self.sitters]}
        save_sheet(rows, file, settings)
        return str(file.relative_to(self.folder.parent))

    def row(self, sitter: Sitter) -> list[Image.Image]:
        """Pictures of one subject."""
        height, width = (side * self.pipeline.vae_scale_factor for side in sitter.target.shape[-2:])
        drawn, *_ = self.pipeline(
            sitter.prompts,
            sitter.features,
            sitter.noun,
            height=height,
            width=width,
            num_inference_steps=self.params.steps,
            guidance_scale=self.params.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(self.params.seed) for _ in sitter.prompts],
            return_dict=False,
        )
        return [*self.pipeline.decode(sitter.target, "pil"), *drawn]


def sitter(params: PicturesParams, batch: TrainingBatch, row: int) -> Sitter:
    """The subject of a sample; ModelError where a prompt lacks its class noun."""
    noun = batch.class_nouns[row]
    prompts = [batch.captions[row], *(prompt.replace("{class}", noun) for prompt in params.prompts)]
    for prompt in prompts:
        noun_ends(prompt, [noun])
    return Sitter(noun, prompts, batch.reference[row : row + 1], batch.latents[row : row + 1])


def save_sheet(rows: list[list[Image.Image]], file: Path, settings: dict[str, Any]) -> None:
    """Write rows of pictures of one size as one PNG, whole or not at all; the settings stand in its text chunk."""
    width, height = (side + GAP for side in rows[0][0].size)
    sheet = Image.new("RGB", (width * len(rows[0]) - GAP, height * len(rows) - GAP), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, y * height))
    chunk = PngInfo()
    chunk.add_itxt("customcontrast", json.dumps(settings, ensure_ascii=False))
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.part")
    sheet.save(temporary, format="PNG", pnginfo=chunk)
    temporary.replace(file)
