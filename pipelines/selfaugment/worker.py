"""A person's name -> pictures of them by the base model, with what was measured on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from model.backbones.clip import Clip, load_clip
from model.backbones.diffusion import load_diffusion
from model.backbones.encoders import load_encoder
from model.backbones.grounded_sam import load_detector
from model.backbones.segmenters.detection import Detection
from model.backbones.variant import Variant, load_variant
from model.images.marks import marked_png
from model.images.segment import box_on_white
from model.pipeline.stock import PromptSampler
from pipelines import tables
from pipelines.engine.shards import Rows
from pipelines.selfaugment.people import NAME, PLAIN, NamedPerson, SelfAugmentParams, seed
from pipelines.selfaugment.verdicts import agreement, mean_face
from runtime.errors import UserError

STAGE_NAME = "selfaugment"


@dataclass(frozen=True)
class SelfAugmentModels:
    """The frozen models of the stage."""

    sampler: Callable[[Sequence[str], Sequence[int]], list[Image.Image]]
    """Prompts and seeds to images."""
    detector: Callable[[Sequence[Image.Image], Sequence[str]], list[Detection | None]]
    """Images and phrases to the best box."""
    face: Callable[[Sequence[Image.Image]], np.ndarray]
    """Crops to unit ID vectors [n, e]."""
    clip_t: Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray]
    """Cosine of each image and its text [n]."""
    origin: dict[str, str]
    """The ids of the weights that make an image."""


def load_models(params: SelfAugmentParams, variant: Variant, device: str) -> SelfAugmentModels:
    """Return the models of a variant.

    Raises:
        UserError: it has no face recogniser.
        ModelError: weights are missing or invalid.
    """
    if variant.face is None:
        raise UserError(
            f"variant '{variant.name}' names no face recogniser; add `face` to its JSON, as docs/people.md shows"
        )
    dtype, size = getattr(torch, params.dtype), params.batch_size
    diffusion = load_diffusion(variant.diffusion, dtype, device)
    detector = load_detector(variant.detector, device, batch_size=size)
    face = load_encoder("face", variant.face, device, size)
    clip = load_clip(variant.clip, device, batch_size=size)
    sampler = PromptSampler.of(diffusion, variant.resolution, params.steps, params.guidance_scale, size)
    return SelfAugmentModels(
        sampler,
        detector.detect,
        lambda crops: face.embed([face.prepare(crop) for crop in crops]).cpu().numpy(),
        lambda images, texts: clip_t(clip, images, texts),
        {"base_model": f"{diffusion.name}@{diffusion.revision}"},
    )


def clip_t(clip: Clip, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
    """Return the cosine of each image and its text [n]."""
    found: np.ndarray = (clip.encode_image(images) * clip.encode_text(texts)).sum(dim=-1).cpu().numpy()
    return found


class SelfAugmentWorker:
    """Makes and measures the pictures of people, one person after another."""

    def __init__(
        self,
        params: SelfAugmentParams,
        variant: str,
        device: str,
        load: Callable[[SelfAugmentParams, Variant, str], SelfAugmentModels] = load_models,
    ) -> None:
        self.params, self.models = params, load(params, load_variant(variant), device)

    def compute(self, payloads: Sequence[list[dict[str, Any]]]) -> list[Rows]:
        return [self.person(payload) for payload in payloads]

    def person(self, wanted: Sequence[dict[str, Any]]) -> Rows:
        """Return the rows of a person: pictures and people, or rejects of all pictures if the name is not known."""
        first, params = wanted[0], self.params
        person = NamedPerson(first["name"], first["class_name"])
        numbers = range(params.seeds)
        probes = self.models.sampler(
            [params.plain.replace(NAME, person.name)] * params.seeds,
            [seed(person, params.plain, index, params) for index in numbers],
        )
        found = self.detect(probes, person)
        faces = self.embed(probes, found)
        agreed = agreement(faces)
        known = agreed >= params.agreement
        row = {"person": person.id, "name": person.name, "class_name": person.noun}
        people = [row | {"agreement": agreed, "known": known}]
        if not known:
            detail = f"{agreed:.3f}"
            return {
                "people": people,
                "rejects": [tables.reject(row["frame_id"], STAGE_NAME, "unknown_name", detail) for row in wanted],
            }
        plain = [row for row in wanted if row["group"] == PLAIN]
        edits = [row for row in wanted if row["group"] != PLAIN]
        prompts = [row["prompt"].replace(NAME, person.name) for row in edits]
        edited = self.models.sampler(prompts, [row["seed"] for row in edits])
        by_seed = {seed(person, params.plain, index, params): index for index in numbers}
        places = [by_seed[row["seed"]] for row in plain]
        boxes = self.detect(edited, person)
        images = [*(probes[place] for place in places), *edited]
        detections = [*(found[place] for place in places), *boxes]
        vectors = [*(faces[place] for place in places), *self.embed(edited, boxes)]
        rows = self.measured([*plain, *edits], images, detections, vectors, mean_face(faces))
        return {"people": people, "pictures": rows}

    def measured(
        self,
        wanted: Sequence[dict[str, Any]],
        images: Sequence[Image.Image],
        detections: Sequence[Detection | None],
        faces: Sequence[np.ndarray | None],
        mean: np.ndarray | None,
    ) -> list[dict[str, Any]]:
        """Return rows of the pictures table."""
        texts = self.models.clip_t(images, [row["caption"] for row in wanted])
        how = {"steps": self.params.steps, "guidance_scale": self.params.guidance_scale}
        rows = []
        for row, image, detection, face, text in zip(wanted, images, detections, faces, texts, strict=True):
            # The name stays out of the image as of its caption.
            settings = {"prompt": row["caption"], "class_nouns": [row["class_name"]], "seed": row["seed"], **how}
            columns = {name: value for name, value in row.items() if name != "name"}
            rows.append(
                columns
                | {
                    "face": None if detection is None else detection.score,
                    "second_face": 0.0 if detection is None else detection.other,
                    "cosine": None if face is None or mean is None else float(face @ mean),
                    "clip_t": float(text),
                    "path": None,
                    "image": marked_png(image, settings | {"stage": STAGE_NAME} | self.models.origin),
                }
            )
        return rows

    def detect(self, images: Sequence[Image.Image], person: NamedPerson) -> list[Detection | None]:
        """Return the best box of each image's face; None where there is none at all."""
        phrase = self.params.phrase.replace("{class}", person.noun)
        return self.models.detector(images, [phrase] * len(images))

    def embed(self, images: Sequence[Image.Image], found: Sequence[Detection | None]) -> list[np.ndarray | None]:
        """Return the unit ID vector [e] of each image's face; None where there is none."""
        seen = [detection is not None and detection.score >= self.params.min_detection for detection in found]
        crops = [
            box_on_white(image, detection.box, self.params.margin)
            for image, detection, is_face in zip(images, found, seen, strict=True)
            if detection is not None and is_face
        ]
        vectors = iter(self.models.face(crops))
        return [next(vectors) if is_face else None for is_face in seen]
