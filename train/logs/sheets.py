"""Sample sheets at fixed seeds during training: images the adapter generates of subjects from cached features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from PIL import Image
from torch import Tensor

from model.adapter import Adapter
from model.backbones.diffusion import Diffusion
from model.images.marks import marks
from model.objective import TrainingBatch
from model.pipeline.pipeline import CustomContrastPipeline, build_pipeline
from model.prompt import noun_ends
from runtime.errors import UserError
from train.batches.training_set import require_room
from train.recipe import PicturesParams

GAP = 2  # px between images


@dataclass(frozen=True)
class SheetSubject:
    """A sampled subject: one row of a sheet."""

    noun: str
    prompts: list[str]
    """Its target's caption, then the prompts of the params."""
    features: Tensor
    """[1, K, N, d] of its reference."""
    target: Tensor
    """[1, C, h, w] latent of its target, multiplied by the VAE's scaling factor."""


@dataclass(frozen=True)
class Samples:
    """Generates sheets: per subject a row of its target as decoded by the VAE, then one image per prompt.

    Nothing is drawn from the global random generators and no weight is touched, so a run with sheets trains exactly as
    one without. The backbone is used as is, so one process generates while the others wait.
    """

    params: PicturesParams
    subjects: list[SheetSubject]
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
        """Sheets in `folder`/samples of the first subjects of a batch, for adapters of the size of `adapter`.

        Raises:
            ModelError: a prompt lacks the subject's class noun.
            UserError: a prompt is too long up to its class noun, or an image would take more steps than the diffusion
                process has.
        """
        timesteps = cast(Any, diffusion.scheduler).config.num_train_timesteps
        if params.steps > timesteps:
            raise UserError(
                f"train.pictures.steps is {params.steps}, but the base model was trained on {timesteps} timesteps; give"
                " at most that many"
            )
        with torch.random.fork_rng(devices=[]):  # a new adapter draws its initial weights
            copy = Adapter(adapter.config).to(adapter.device, adapter.dtype).eval().requires_grad_(False)
        pipeline = build_pipeline(diffusion, copy)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.black = batch.black  # there is no image encoder
        subjects = [sheet_subject(params, batch, row) for row in range(min(params.subjects, len(batch.captions)))]
        prompts = [(prompt, subject.noun) for subject in subjects for prompt in subject.prompts]
        advice = "shorten train.pictures.prompts"
        require_room(diffusion, adapter.config, [text for text, _ in prompts], [noun for _, noun in prompts], advice)
        return cls(params, subjects, pipeline, folder / "samples")

    @torch.no_grad()
    def draw(self, weights: dict[str, Tensor], steps: int) -> str:
        """Generate the sheet of an adapter's weights after `steps` steps; return its path within the run's folder."""
        self.pipeline.adapter.load_state_dict(weights)
        rows = [self.row(subject) for subject in self.subjects]
        file = self.folder / f"step-{steps:06d}.png"
        settings = {
            "steps": steps,
            "seed": self.params.seed,
            "prompts": [subject.prompts for subject in self.subjects],
            "base_model": self.pipeline.adapter.config.base_model,
        }
        save_sheet(rows, file, settings)
        return str(file.relative_to(self.folder.parent))

    def row(self, subject: SheetSubject) -> list[Image.Image]:
        """Images of one subject."""
        height, width = (side * self.pipeline.vae_scale_factor for side in subject.target.shape[-2:])
        images, *_ = self.pipeline(
            subject.prompts,
            subject.features,
            subject.noun,
            height=height,
            width=width,
            num_inference_steps=self.params.steps,
            guidance_scale=self.params.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(self.params.seed) for _ in subject.prompts],
            return_dict=False,
        )
        return [*self.pipeline.decode(subject.target, "pil"), *images]


def sheet_subject(params: PicturesParams, batch: TrainingBatch, row: int) -> SheetSubject:
    """The subject of a sample; raises ModelError if a prompt lacks its class noun."""
    noun = batch.class_nouns[row]
    prompts = [batch.captions[row], *(prompt.replace("{class}", noun) for prompt in params.prompts)]
    for prompt in prompts:
        noun_ends(prompt, [noun])
    return SheetSubject(noun, prompts, batch.reference[row : row + 1], batch.latents[row : row + 1])


def save_sheet(rows: list[list[Image.Image]], file: Path, settings: dict[str, Any]) -> None:
    """Write rows of equal-sized images as one PNG with its `marks`, atomically."""
    width, height = (side + GAP for side in rows[0][0].size)
    sheet = Image.new("RGB", (width * len(rows[0]) - GAP, height * len(rows) - GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * height))
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.part")
    sheet.save(temporary, format="PNG", pnginfo=marks(settings))
    temporary.replace(file)
