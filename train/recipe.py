"""What a training run is made of: its parameters, and the hash that names it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from model.losses import Factor, Similarity
from model.objective import ObjectiveConfig
from pipelines import tables
from runtime.closure import code_digest
from runtime.digest import digest_files
from runtime.errors import UserError
from runtime.params import Section

TABLES = {
    "triplets": "pairs",
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


class ValidationParams(Section):
    """The losses on subjects that are not trained on."""

    subjects: int = Field(ge=0)  # held out of training, by the hash of their ids; 0: no validation
    batches: int = Field(ge=1)  # of train.batch samples each, always the same
    every: int = Field(ge=1)  # steps


class PicturesParams(Section):
    """Pictures drawn while training."""

    every: int = Field(ge=0)  # steps; 0: none
    subjects: int = Field(ge=1)  # rows of a sheet
    prompts: list[str]  # columns, after the target and its own caption; {class} is the subject's noun
    steps: int = Field(ge=1)  # of DDIM
    guidance_scale: float
    seed: int = Field(ge=0)


class WarningParams(Section):
    """When a quantity counts as one that does not move; see `train.log.standstills`."""

    after: float = Field(gt=0, le=1)  # share of the run
    windows: int = Field(ge=1)  # of log_every steps, which the means of the start and of now are taken over
    location: float = Field(ge=0, le=1)  # share of the way to the best value that must have been covered
    accuracy: float = Field(ge=0, le=1)  # as location


class TrainParams(Section):
    """How the adapter is trained."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)  # samples of a micro step over all ranks, each of another subject
    accumulation: int = Field(ge=1)  # micro steps of a step; contrastive negatives come from one micro step
    ranks: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "cosine"]
    warmup: int = Field(ge=0)  # steps
    weight_decay: float = Field(ge=0)
    gradient_clipping: float = Field(gt=0)  # largest norm of the gradient
    precision: Literal["fp32", "bf16", "fp16"]
    zero_stage: Literal[0, 1, 2, 3]
    offload: Literal["none", "optimizer", "all"]  # what waits in CPU memory: optimizer state, or the weights too
    compile: bool  # the UNet, by torch.compile
    ema: float | None = Field(gt=0, lt=1)  # decay a step of the moving average of the weights; null: none
    gradient_checkpointing: Literal["none", "text", "all"]  # what is computed again: text encoders, or the UNet too
    deterministic: bool
    seed: int = Field(ge=0)
    pairing: Literal["triplet", "self"]
    positive_timesteps: Literal["independent", "shared"]
    mixture: dict[str, float]  # share of the samples by source; none: every subject once an epoch
    prefetch: int = Field(ge=0)  # batches read ahead, each by a thread of its own; 0: none
    drop: DropParams
    objective: ObjectiveParams
    log_every: int = Field(ge=1)  # steps
    timestep_buckets: int = Field(ge=1)  # parts of the diffusion process with an L_diff of their own
    tensorboard: bool
    warnings: WarningParams
    validation: ValidationParams
    pictures: PicturesParams
    checkpoint_every: int = Field(ge=1)  # steps

    @field_validator("mixture")
    @classmethod
    def mixture_has_shares(cls, mixture: dict[str, float]) -> dict[str, float]:
        if mixture and not (all(0 <= weight < math.inf for weight in mixture.values()) and any(mixture.values())):
            raise ValueError(f"{mixture} has no shares; give each source a weight of at least 0, and one more than 0")
        return mixture

    @model_validator(mode="after")
    def goes_together(self) -> Self:
        if self.precision == "fp16" and self.zero_stage == 0:
            raise ValueError("precision fp16 needs zero_stage 1, 2 or 3: DeepSpeed scales the loss under these only")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload optimizer needs zero_stage 1, 2 or 3")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(f"offload all needs zero_stage 3, and it is {self.zero_stage}")
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile does not go with zero_stage 3, whose gathering of each layer breaks the graph there"
            )
        if self.pictures.every and self.zero_stage == 3:
            raise ValueError("pictures need the whole backbone on a rank, and zero_stage 3 shards it; set every to 0")
        return self

    def rows(self, ranks: int) -> int:
        """Samples of a micro step on each of so many ranks.

        Raises:
            UserError: they do not divide the batch.
        """
        if self.batch % ranks:
            raise UserError(f"train.batch = {self.batch} does not divide into {ranks} ranks; change one of them")
        return self.batch // ranks

    @property
    def samples(self) -> int:
        """Samples of a step, over all ranks and micro steps."""
        return self.batch * self.accumulation

    def draws(self, step: int) -> range:
        """Which of the sampler's batches the micro steps of a 0-based step take."""
        return range(step * self.accumulation, (step + 1) * self.accumulation)

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


def run_code() -> str:
    """16 hex digits that identify the code a run's numbers come from."""
    return code_digest("train.run")


def recipe(train: TrainParams, model: ModelParams, **others: Any) -> dict[str, Any]:
    """All that the weights of a run depend on, JSON-like: its parameters, its input, `others`."""
    told = {"tensorboard", "warnings", "pictures"}
    values = train.model_dump(exclude={"checkpoint_every", "prefetch", "ranks"} | told)
    return {"train": values, "model": model.model_dump(), **others}
