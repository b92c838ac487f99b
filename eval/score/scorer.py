"""The scorer: images of a subject -> rows of the scores table, one metric at a time, with its models."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from eval.protocol import protocol
from eval.score.measures import FACE, measure
from eval.score.metrics import IntervalParams, MissPolicy, with_misses
from eval.score.segmentation import SubjectFinder
from eval.score.views import Models, ScoredImages, ScoringWork, SharedVectors
from model.backbones.encoders import Encoder, Kind, load_encoder
from model.backbones.grounded_sam import load_grounded_sam
from model.backbones.perceptual import Perceptual, load_perceptual
from model.backbones.reward import Reward, load_reward
from model.backbones.variant import Spec, Variant
from pipelines.photos.roots import Roots
from runtime.errors import UserError
from runtime.params import Section


class EncoderSpec(Spec):
    """An image encoder in addition to the variant's clip and dino."""

    kind: Kind


class ScoreParams(Section):
    """How images are scored."""

    metrics: tuple[str, ...] = Field(min_length=1)  # see eval/score/measures.py
    encoders: dict[str, EncoderSpec]  # by name, the prefix of their metrics
    miss: MissPolicy  # similarity of an image in which the subject is not found
    phrase: str  # text query of the detector; {class} is the class noun
    min_detection: float  # detections below this score are misses, 0..1
    min_piece: float  # mask components smaller than this fraction of the largest are dropped
    margin: float  # white border around a segment, fraction of its longer side
    # Mask quality of the photos that images are compared with.
    photo_quality: tuple[Literal["ok", "small", "large", "border", "several", "low_score"], ...]
    intervals: IntervalParams
    batch_size: int = Field(ge=1)
    dtype: Literal["float32", "float16", "bfloat16"]
    threads: int  # CPU threads; the same number gives the same bytes

    @field_validator("photo_quality")
    @classmethod
    def references_are_compared_with(cls, quality: tuple[str, ...]) -> tuple[str, ...]:
        if "ok" not in quality:
            raise ValueError("the list must contain ok, the quality of every reference")
        return quality

    @field_validator("encoders")
    @classmethod
    def encoders_have_names_of_their_own(cls, encoders: dict[str, EncoderSpec]) -> dict[str, EncoderSpec]:
        for name in encoders:
            if name in ("clip", "dino", FACE) or not re.fullmatch("[a-z][a-z0-9_]*", name):
                raise ValueError(
                    f"'{name}' must be one lower-case word other than clip, dino and face, which the variant sets"
                )
        return encoders

    @model_validator(mode="after")
    def metrics_are_known(self) -> Self:
        kinds = self.kinds()
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError("a metric is listed twice")
        for name in self.metrics:
            measure(name, kinds)
        return self

    def kinds(self) -> dict[str, Kind]:
        """Return the kind of each encoder by name."""
        return {"clip": "clip", "dino": "dino", **{name: spec.kind for name, spec in self.encoders.items()}}


def specs(params: ScoreParams, variant: Variant) -> dict[str, Spec]:
    """Return the weight specs of every model that the chosen metrics need, by name.

    Raises:
        UserError: the variant has no weights for a metric.
    """
    known: dict[str, Spec | None] = {"clip": variant.clip, "dino": variant.dino, **params.encoders}
    known |= {"reward": variant.reward, "lpips": variant.lpips, FACE: variant.face_metric}
    found: dict[str, Spec] = {}
    for name in params.metrics:
        for model in measure(name, params.kinds()).models:
            spec = known[model]
            if spec is None:
                raise UserError(
                    f"score.metrics names '{name}', and the variant {variant.name} has no weights for '{model}'; "
                    f"remove the metric, or add the weights to the variant's JSON"
                )
            found[model] = spec
    return found


class Loaded:
    """The models of `eval.score.views.Models`, on a device."""

    def __init__(self, params: ScoreParams, variant: Variant, device: str) -> None:
        self.params, self.device = params, device
        self.specs: dict[str, Any] = specs(params, variant)
        self.dtype = getattr(torch, params.dtype)
        self.encoder = cache(self.load_encoder)
        self.reward = cache(self.load_reward)
        self.lpips = cache(self.load_lpips)

    def load_encoder(self, name: str) -> Encoder:
        """Load an image encoder."""
        kind: Kind = "face" if name == FACE else self.params.kinds()[name]
        return load_encoder(kind, self.specs[name], self.device, self.params.batch_size, self.dtype)

    def load_reward(self) -> Reward:
        """Load ImageReward."""
        return load_reward(self.specs["reward"], self.device, self.dtype, self.params.batch_size)

    def load_lpips(self) -> Perceptual:
        """Load LPIPS in float32: its distances are small differences of squares."""
        return load_perceptual(self.specs["lpips"], self.device, self.params.batch_size)


class Scorer:
    """Computes a metric of a method's images of one subject; intermediate results are cached until the next work."""

    def __init__(self, params: ScoreParams, models: Models, roots: Roots, decoders: int) -> None:
        self.params, self.models, self.roots, self.decoders = params, models, roots, decoders
        self.forget()

    def forget(self) -> None:
        """Clear all cached vectors."""
        self.memory = SharedVectors()
        self.view: ScoredImages | None = None

    def __call__(self, asked: tuple[ScoringWork, str]) -> list[dict[str, Any]]:
        work, name = asked
        chosen = measure(name, self.params.kinds())
        view = self.pictures(work)
        values: list[float | None] = [None if value != value else float(value) for value in chosen.values(view)]
        if chosen.segments:
            values = with_misses(values, view.found.tolist(), self.params.miss)
        return [
            {
                "method": work.method,
                "subject_id": work.subject.subject_id,
                "group": picture.group,
                "prompt_id": picture.prompt_id,
                "index": picture.index,
                "metric": name,
                "value": value,
            }
            for picture, value in zip(work.pictures, values, strict=True)
        ]

    def pictures(self, work: ScoringWork) -> ScoredImages:
        """Return the view of `work`, reusing the last one if the work is the same."""
        if self.view is None or self.view.work is not work:
            params = self.params
            for photo in work.photos:
                self.roots[photo.source]  # opened here, before several threads use it
            self.view = ScoredImages(
                work, self.models, self.roots, self.memory, params.margin, params.batch_size, self.decoders
            )
        return self.view


def load_scorer(params: ScoreParams, variant: Variant, roots: Roots, device: str, decoders: int) -> Scorer:
    """Return the scorer; each model is loaded on first use."""
    torch.set_num_threads(params.threads)
    return Scorer(params, Loaded(params, variant, device), roots, decoders)


def load_finder(params: ScoreParams, variant: Variant, device: str, decoders: int) -> SubjectFinder:
    """Return the finder of subjects in generated images, with its models."""
    torch.set_num_threads(params.threads)
    options = {"dtype": getattr(torch, params.dtype), "batch_size": params.batch_size}
    model = load_grounded_sam(variant.detector, variant.sam, device, **options)
    return SubjectFinder(
        model, params.phrase, params.min_detection, params.min_piece, decoders, ahead=2 * params.batch_size
    )


def comparable(subject: protocol.HeldOutSubject, params: ScoreParams) -> tuple[protocol.HeldOutPhoto, ...]:
    """Return the photos that images are compared with: those with an accepted mask quality."""
    return tuple(photo for photo in subject.photos if photo.quality in params.photo_quality)
