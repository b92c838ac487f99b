"""The scorer: photos and pictures of a subject -> rows of the scores table, for the model and both oracles."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import field_validator

from eval import metrics, protocol
from eval.segmentation import find_subjects
from model.backbones.clip import load_clip
from model.backbones.dino import load_dino
from model.backbones.grounded_sam import load_grounded_sam
from model.backbones.variant import Variant
from model.segment import on_white
from params import Section
from pipelines.storage import Roots, SourceParams


class ScoreParams(Section):
    """How pictures are compared."""

    miss: metrics.MissPolicy  # what the similarity is where the subject is not found in a picture
    phrase: str  # what the detector is asked for; {class} is the class noun
    min_detection: float  # score below which nothing was found, 0..1
    min_piece: float  # pieces of a mask smaller than this fraction of the largest are dropped
    margin: float  # white border of a segment, fraction of its longer side
    photo_quality: tuple[
        Literal["ok", "small", "large", "border", "low_score"], ...
    ]  # masks of the photos compared with
    batch_size: int
    dtype: Literal["float32", "float16", "bfloat16"]
    threads: int  # CPU threads; the same number gives the same bytes

    @field_validator("photo_quality")
    @classmethod
    def references_are_compared_with(cls, quality: tuple[str, ...]) -> tuple[str, ...]:
        if "ok" not in quality:
            raise ValueError("the list must hold ok, the quality of every reference")
        return quality


@dataclass(frozen=True)
class Asked:
    """A prompt and the photo shown with it: what the copy-paste oracle answers with the photo itself."""

    prompt_id: int
    group: str
    prompt: str
    reference: str  # frame_id


@dataclass(frozen=True)
class Work:
    """One subject: the photos compared with, what was asked, and the rows of the generations table."""

    subject: protocol.Subject
    photos: tuple[protocol.Photo, ...]
    asked: tuple[Asked, ...]
    generations: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Encoders:
    """The scorers: unit image embeddings for similarity, CLIP's texts for controllability, Grounded SAM for masks."""

    clip: Any
    dino: Any
    grounded_sam: Any

    def similarity(self, pictures: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Return unit vectors [B, d] of pictures by the column of the scores table they are for."""
        return {"clip_i": _numpy(self.clip.encode_image(pictures)), "dino_i": _numpy(self.dino.encode_image(pictures))}

    def controllability(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """Return the cosine of each whole picture and its prompt, [B]."""
        texts = sorted(set(prompts))
        vectors = dict(zip(texts, _numpy(self.clip.encode_text(texts)), strict=True))
        images = _numpy(self.clip.encode_image(pictures))
        return np.array([image @ vectors[prompt] for image, prompt in zip(images, prompts, strict=True)])


class Scorer:
    """Computes the rows of one subject."""

    def __init__(self, params: ScoreParams, encoders: Encoders, roots: Roots) -> None:
        self.params, self.encoders, self.roots = params, encoders, roots

    def __call__(self, work: Work) -> list[dict[str, Any]]:
        whole = {photo.frame_id: protocol.read_photo(self.roots, photo) for photo in work.photos}
        segments = [self.segment(*whole[photo.frame_id]) for photo in work.photos]
        photos = self.encoders.similarity(segments)
        images = {frame_id: image for frame_id, (image, _) in whole.items()}
        return [
            *self.real(work, photos),
            *self.copies(work, photos, images),
            *(self.pictures(work, photos) if work.generations else []),
        ]

    def real(self, work: Work, photos: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        """Yield the rows of the real photos, each against the others."""
        scores = {column: metrics.mean_cosines_to_others(vectors) for column, vectors in photos.items()}
        for index in range(len(work.photos)):
            values = {column: _null(values[index]) for column, values in scores.items()}
            yield row(metrics.REAL, work.subject, (-1, metrics.PHOTO, index), True, None, values)

    def copies(
        self, work: Work, photos: dict[str, np.ndarray], images: dict[str, Image.Image]
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of the reference photo standing in for every picture; it is among the photos, as it is for a
        model."""
        if not work.asked:
            return
        scores = {column: metrics.mean_cosines(vectors, vectors) for column, vectors in photos.items()}
        place = {photo.frame_id: number for number, photo in enumerate(work.photos)}
        texts = self.encoders.controllability([images[a.reference] for a in work.asked], [a.prompt for a in work.asked])
        seen: dict[int, int] = {}
        for asked, text in zip(work.asked, texts, strict=True):
            index = seen[asked.prompt_id] = seen.get(asked.prompt_id, -1) + 1
            values = {column: _null(cosines[place[asked.reference]]) for column, cosines in scores.items()}
            yield row(metrics.COPY, work.subject, (asked.prompt_id, asked.group, index), True, float(text), values)

    def pictures(self, work: Work, photos: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        """Yield the rows of the generated pictures, each against all photos."""
        made = [Image.open(io.BytesIO(g["image"])).convert("RGB") for g in work.generations]
        texts = self.encoders.controllability(made, [g["prompt"] for g in work.generations])
        phrase = self.params.phrase.replace("{class}", work.subject.class_name)
        masks = find_subjects(
            self.encoders.grounded_sam, made, phrase, self.params.min_detection, self.params.min_piece
        )
        found = [mask is not None for mask in masks]
        vectors = self.encoders.similarity([self.segment(i, m) for i, m in zip(made, masks, strict=True)])
        scores = {
            column: metrics.with_misses(
                metrics.mean_cosines(vectors[column], photos[column]).tolist(), found, self.params.miss
            )
            for column in photos
        }
        for number, g in enumerate(work.generations):
            values = {column: values[number] for column, values in scores.items()}
            place = (g["prompt_id"], g["group"], g["index"])
            yield row(g["method"], work.subject, place, found[number], float(texts[number]), values)

    def segment(self, image: Image.Image, mask: np.ndarray | None) -> Image.Image:
        """Return what the encoders of similarity see: the subject on white, or the whole picture without a mask."""
        return image if mask is None else on_white(image, mask, margin=self.params.margin)


def row(
    method: str,
    subject: protocol.Subject,
    place: tuple[int, str, int],
    segmented: bool,
    text: float | None,
    similarity: dict[str, float | None],
) -> dict[str, Any]:
    """Return a row of the scores table; place: prompt_id, group, index."""
    prompt_id, group, index = place
    return {
        "method": method,
        "subject_id": subject.subject_id,
        "prompt_id": prompt_id,
        "group": group,
        "index": index,
        "segmented": segmented,
        "clip_t": text,
        **similarity,
    }


def load_scorer(
    params: ScoreParams, variant: Variant, sources: Sequence[SourceParams], device: str, photos_only: bool
) -> Scorer:
    """Return the scorer with its encoders; real photos need no segmenter, they come with masks."""
    torch.set_num_threads(params.threads)
    dtype = getattr(torch, params.dtype)
    options = {"device": device, "batch_size": params.batch_size, "dtype": dtype}
    segmenter = None if photos_only else load_grounded_sam(variant.detector, variant.sam, **options)
    encoders = Encoders(load_clip(variant.clip, **options), load_dino(variant.dino, **options), segmenter)
    return Scorer(params, encoders, Roots(sources))


def comparable(subject: protocol.Subject, params: ScoreParams) -> tuple[protocol.Photo, ...]:
    """Return the photos whose mask is good enough to compare with."""
    return tuple(photo for photo in subject.photos if photo.quality in params.photo_quality)


def _numpy(vectors: torch.Tensor) -> np.ndarray:
    return vectors.float().cpu().numpy()


def _null(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
