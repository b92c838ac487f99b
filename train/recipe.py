"""Training parameters, and the recipe whose hash names a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from model.backbones.features.source import FeatureParams, FeatureSource
from model.backbones.variant import Variant
from model.losses import Factor, MapScale, Similarity
from model.objective import ObjectiveConfig
from model.prompt import Place
from pipelines import tables
from runtime.closure import code_digest
from runtime.digest import digest_files
from runtime.errors import UserError
from runtime.params import Band, Section
from train.curriculum import CurriculumParams

TABLES = {
    "triplets": "pairs",
    "frames": "curate",
    "similarity": "similarity",
    "latents": "encode",
    "features": "encode",
}
"""Tables that training reads, by name, and the stage that writes each."""


Pairing = Literal["triplet", "self"]
"""Which photo is the reference: the triplet's, or the target itself."""


class ScoringParams(Section):
    """RealCustom's scoring module; see `model.methods.config.ScoringConfig`."""

    width: int | None = Field(ge=1)
    gain: float = Field(gt=0)
    fusion: Literal["schedule", "text", "visual", "mean", "none"]


class ProjectorParams(Section):
    """RealCustom++'s projector; see `model.methods.config.ProjectorConfig`."""

    high: bool
    shallow: bool
    head: int = Field(ge=1)


class FaceParams(Section):
    """DreamIdentity's face recogniser; see `model.methods.config.FaceConfig`."""

    train: Literal["all", "projector"]
    scales: Literal["all", "last"]


class WordsParams(Section):
    """DreamIdentity's words; see `model.methods.config.WordsConfig`."""

    place: Literal["replace", "after_noun"]
    norm: Literal["none", "noun", "names"]
    names: str | None  # file of names, one a line, whose embeddings `norm: names` follows
    start: float = Field(ge=0, le=1)
    hidden: int | None = Field(ge=1)  # width inside a word's MLP; null: that of the text embedding

    @model_validator(mode="after")
    def names_are_given(self) -> Self:
        if (self.norm == "names") != (self.names is not None):
            raise ValueError(
                f"norm is {self.norm} and names is {self.names}; give a file of names with norm names only"
            )
        return self

    def read_names(self) -> list[str]:
        """The names in the file, none without one; UserError if it cannot be read."""
        if self.names is None:
            return []
        try:
            lines = Path(self.names).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"model.words.names: {self.names} cannot be read ({error}); give a text file") from error
        return [line.strip() for line in lines if line.strip()]


class ModelParams(Section):
    """Adapter sizes and switches; see `model.methods.config.AdapterConfig`."""

    encoder: Literal["mfi", "ip_adapter_plus", "realcustom", "realcustom_pp", "dreamidentity"]
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
    noun_weight: float = Field(ge=0)
    location_masks: bool
    fourier_pairs: int
    fourier_sigma_t: float
    fourier_sigma_l: float
    fourier_seed: int
    scoring: ScoringParams
    projector: ProjectorParams
    face: FaceParams
    words: WordsParams

    def sizes(self, network: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `AdapterConfig`, and `granularity`; `network` is that of the `FeatureSource`."""
        found = self.model_dump(exclude={"words": {"names"}})
        return found | {"face": found["face"] | dict(network)}

    @property
    def place(self) -> Place:
        """Where the method's pseudo-words stand in a caption."""
        return self.words.place if self.encoder == "dreamidentity" else "after_noun"

    def features(self, variant: Variant) -> FeatureSource:
        """The image encoder that the method reads; ModelError if `variant` has none for it."""
        return FeatureParams.model_validate(self.model_dump()).source(variant)


class DropParams(Section):
    """Condition dropout for classifier-free guidance; disjoint fractions of the samples."""

    image: float = Field(ge=0)
    text: float = Field(ge=0)
    both: float = Field(ge=0)

    @model_validator(mode="after")
    def leaves_some(self) -> Self:
        if self.image + self.text + self.both > 1:
            raise ValueError(f"image, text and both add up to {self.image + self.text + self.both:g}, more than 1")
        return self


class ObjectiveParams(Section):
    """Loss weights, temperatures and variants; see `model.objective.ObjectiveConfig`."""

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
    location_scale: MapScale
    strength: float
    regularisation_weight: float = Field(ge=0)

    def config(self) -> ObjectiveConfig:
        return ObjectiveConfig(**self.model_dump())


class ValidationParams(Section):
    """Losses on held-out subjects."""

    subjects: int = Field(ge=0)  # held out of training, chosen by the hash of their ids; 0: no validation
    batches: int = Field(ge=1)  # of train.batch samples each, always the same
    every: int = Field(ge=1)  # steps


class PicturesParams(Section):
    """Sample sheets generated during training."""

    every: int = Field(ge=0)  # steps; 0: none
    subjects: int = Field(ge=1)  # rows of a sheet
    prompts: list[str]  # columns, after the target and its own caption; {class} is the subject's class noun
    steps: int = Field(ge=1)  # DDIM steps
    guidance_scale: float
    seed: int = Field(ge=0)


class WarningParams(Section):
    """When a quantity counts as plateaued; see `train.logs.log.standstills`."""

    after: float = Field(gt=0, le=1)  # fraction of the run
    windows: int = Field(ge=1)  # windows of log_every steps to average, at the start and now
    location: float = Field(ge=0, le=1)  # fraction of the way to the best value that must have been covered
    accuracy: float = Field(ge=0, le=1)  # likewise


class TrainParams(Section):
    """Training parameters."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)  # samples per micro step over all ranks, each of a different subject
    accumulation: int = Field(ge=1)  # micro steps per step; contrastive negatives come from a single micro step
    ranks: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "cosine"]
    warmup: int = Field(ge=0)  # steps
    weight_decay: float = Field(ge=0)
    gradient_clipping: float = Field(gt=0)  # maximum gradient norm
    precision: Literal["fp32", "bf16", "fp16"]
    zero_stage: Literal[0, 1, 2, 3]
    offload: Literal["none", "optimizer", "all"]  # kept in CPU memory: optimizer state, or the weights too
    compile: bool  # torch.compile the UNet
    ema: float | None = Field(gt=0, lt=1)  # per-step decay of the weights' moving average; null: none
    gradient_checkpointing: Literal["none", "text", "all"]  # recomputed activations: text encoders', or the UNet's too
    deterministic: bool
    seed: int = Field(ge=0)
    pairing: Pairing | dict[str, Pairing]  # of all samples, or by source
    positive_timesteps: Literal["independent", "shared"]
    mixture: dict[str, float]  # share of the samples per source; empty: every subject once per epoch
    prefetch: int = Field(ge=0)  # batches read ahead, one thread each; 0: none
    curriculum: CurriculumParams
    key_ratio: Band  # share of the image features that realcustom keeps in a step, uniform
    drop: DropParams
    objective: ObjectiveParams
    log_every: int = Field(ge=1)  # steps
    timestep_buckets: int = Field(ge=1)  # ranges of timesteps, each with its own L_diff
    tensorboard: bool
    warnings: WarningParams
    validation: ValidationParams
    pictures: PicturesParams
    checkpoint_every: int = Field(ge=1)  # steps

    @field_validator("mixture")
    @classmethod
    def mixture_has_shares(cls, mixture: dict[str, float]) -> dict[str, float]:
        if mixture and not (all(0 <= weight < math.inf for weight in mixture.values()) and any(mixture.values())):
            raise ValueError(
                f"{mixture} has no usable weights; give each source a weight of at least 0, and one more than 0"
            )
        return mixture

    @field_validator("key_ratio")
    @classmethod
    def keeps_some_features(cls, key_ratio: Band) -> Band:
        if not (key_ratio[0] > 0 and key_ratio[1] <= 1):
            raise ValueError(f"{list(key_ratio)} must be shares above 0, at most 1")
        return key_ratio

    @model_validator(mode="after")
    def goes_together(self) -> Self:
        if self.precision == "fp16" and self.zero_stage == 0:
            raise ValueError("precision fp16 needs zero_stage 1, 2 or 3: DeepSpeed scales the loss only in those")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload optimizer needs zero_stage 1, 2 or 3")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(f"offload all needs zero_stage 3, not {self.zero_stage}")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile does not work with zero_stage 3, which breaks the graph to gather each layer")
        if self.curriculum.schedule != "none" and self.pairing != "triplet":
            raise ValueError(
                f"curriculum chooses between two pairings, and pairing {self.pairing} fixes them; set it to triplet"
            )
        if self.pictures.every and self.zero_stage == 3:
            raise ValueError(
                "pictures need the whole backbone on one rank, but zero_stage 3 shards it; set pictures.every to 0"
            )
        return self

    def rows(self, ranks: int) -> int:
        """Samples per micro step on each of `ranks` ranks.

        Raises:
            UserError: the batch is not divisible by `ranks`.
        """
        if self.batch % ranks:
            raise UserError(f"train.batch = {self.batch} does not divide evenly into {ranks} ranks; change one of them")
        return self.batch // ranks

    @property
    def samples(self) -> int:
        """Samples per step, over all ranks and micro steps."""
        return self.batch * self.accumulation

    def draws(self, step: int) -> range:
        """Indices of the sampler's batches for the micro steps of a 0-based step."""
        return range(step * self.accumulation, (step + 1) * self.accumulation)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a 0-based step: linear warm-up, then constant or a half cosine that ends near 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def input_digest(data: Path) -> str:
    """16 hex digits that identify the bytes of all tables training reads.

    Raises TableError if one is missing.
    """
    return digest_files(*(part for name, stage in TABLES.items() for part in tables.parts(data / stage, name)))


def run_code() -> str:
    """16 hex digits that identify the code a run's numbers depend on."""
    return code_digest("train.run")


def recipe(train: TrainParams, model: ModelParams, **others: Any) -> dict[str, Any]:
    """Everything a run's weights depend on, JSON-like: its parameters, its input, `others`."""
    reporting = {"tensorboard", "warnings", "pictures"}
    values = train.model_dump(mode="json", exclude={"checkpoint_every", "prefetch", "ranks"} | reporting)
    return {"train": values, "model": model.model_dump(mode="json"), **others}
