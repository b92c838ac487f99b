"""What a training run is made of: its parameters, and the hash that names it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from model.losses import Factor, Similarity
from model.objective import ObjectiveConfig
from params import Section, UserError
from pipelines import tables
from stage import digest, digest_files

TABLES = {
    "triplets": "curate",
    "frames": "curate",
    "similarity": "similarity",
    "latents": "encode",
    "features": "encode",
}
"""The tables training reads, and the stage that writes each."""


class ModelParams(Section):
    """Sizes and switches of the adapter; see `model.adapter.AdapterConfig`."""

    encoder: Literal["mfi", "ip_adapter_plus"]
    width: int
    heads: int
    depth: int
    visual_tokens: int
    text_tokens: int
    textual: bool
    tv_fusion: bool
    visual_scope: Literal["all", "own"]
    granularity: Literal["group", "layer"]
    rescale: bool
    fourier_pairs: int
    fourier_sigma_t: float
    fourier_sigma_l: float
    fourier_seed: int


class DropParams(Section):
    """How often a condition is left out, for guidance; fractions of the samples, disjoint."""

    image: float = Field(ge=0)
    text: float = Field(ge=0)
    both: float = Field(ge=0)

    @model_validator(mode="after")
    def leaves_some(self) -> Self:
        if self.image + self.text + self.both > 1:
            raise ValueError(f"image, text and both add up to {self.image + self.text + self.both:g}, more than 1")
        return self


class ObjectiveParams(Section):
    """Weights, temperatures and variants of the losses; see `model.objective.ObjectiveConfig`."""

    contrastive_weight: float
    location_weight: float
    cscl: bool
    macl: bool
    cscl_temperature: float = Field(gt=0)
    macl_temperature: float = Field(gt=0)
    cscl_symmetric: bool
    macl_factor: Factor
    macl_similarity: Similarity
    location_side: float
    strength: float

    def config(self) -> ObjectiveConfig:
        return ObjectiveConfig(**self.model_dump())


class TrainParams(Section):
    """How the adapter is trained."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)  # samples of a step over all ranks, each of another subject
    ranks: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "cosine"]
    warmup: int = Field(ge=0)  # steps
    weight_decay: float = Field(ge=0)
    gradient_clipping: float = Field(gt=0)  # largest norm of the gradient
    precision: Literal["fp32", "bf16", "fp16"]
    zero_stage: Literal[1, 2, 3]
    gradient_checkpointing: Literal["none", "text", "all"]  # what is computed again: text encoders, or the UNet too
    deterministic: bool
    seed: int = Field(ge=0)
    pairing: Literal["triplet", "self"]
    positive_timesteps: Literal["independent", "shared"]
    drop: DropParams
    objective: ObjectiveParams
    log_every: int = Field(ge=1)  # steps
    checkpoint_every: int = Field(ge=1)  # steps

    def rows(self, ranks: int) -> int:
        """Samples of a step on each of so many ranks.

        Raises:
            UserError: they do not divide the batch.
        """
        if self.batch % ranks:
            raise UserError(f"train.batch = {self.batch} does not divide into {ranks} ranks; change one of them")
        return self.batch // ranks

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a 0-based step: a linear warm-up, then constant, or a half cosine that ends near 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def input_digest(data: Path) -> str:
    """16 hex digits that identify the bytes of all tables training reads.

    Raises TableError where one is missing.
    """
    return digest_files(*(part for name, stage in TABLES.items() for part in tables.parts(data / stage, name)))


def code_digest() -> str:
    """16 hex digits that identify the code a run's numbers come from."""
    root = Path(__file__).parent
    model = sorted(path for path in (root.parent / "model").rglob("*.py") if path.parent.name != "bench")
    return digest_files(*sorted(root.glob("*.py")), *model)


def run_digest(train: TrainParams, model: ModelParams, **others: Any) -> str:
    """16 hex digits that name a run: its parameters, its input and everything else its weights depend on."""
    recipe = train.model_dump(exclude={"checkpoint_every", "ranks"})
    return digest([recipe, model.model_dump(), others])
