"""Segmented subject photos -> embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator

from model.backbones.encoders import Kind, load_encoder
from model.backbones.variant import Spec, load_variant
from model.images.segment import on_white
from pipelines.engine.shards import Rows
from pipelines.photos import segments
from pipelines.photos.prefetch import prefetch
from pipelines.photos.roots import Roots, SourceParams
from runtime.errors import UserError
from runtime.params import Section


class SimilarityParams(Section):
    """Which encoder compares subjects, and how the comparison is split into tiles."""

    encoder: Kind  # clip, dino, siglip or face
    weights: Spec | None  # of that encoder; None: those of the backbones' variant
    margin: float  # white border around the subject's box, fraction of its longer side
    group_size: int = Field(ge=1)  # subjects compared with one another; batches are sampled from one group
    groupings: int = Field(ge=1)  # seeded partitions into groups, each with its own tiles
    tile: int = Field(ge=1)  # subjects per side of a tile
    neighbours: int = Field(ge=0)  # most similar subjects listed per subject
    same_subject: float | None  # cosine from which two subjects are one object and one is dropped; None: keep all
    seed: int
    batch_size: int = Field(ge=1)
    shard_subjects: int = Field(ge=1)

    @field_validator("weights")
    @classmethod
    def weights_are_known(cls, weights: Spec | None, info: ValidationInfo) -> Spec | None:
        if weights is None and info.data.get("encoder") == "siglip":
            raise ValueError("no variant names a SigLIP, so give {path, revision} of one")
        return weights

    def spec(self, variant: str) -> Spec:
        """Return the location of the encoder's weights."""
        if self.weights is not None:
            return self.weights
        named = load_variant(variant)
        found: Spec | None = {"clip": named.clip, "dino": named.dino, "face": named.face}[self.encoder]
        if found is None:
            raise UserError(
                f"similarity.encoder is face, but variant '{named.name}' has no 'face'; add one to its JSON, or give"
                " similarity.weights"
            )
        return found


class SimilarityWorker:
    """Embeds segmented subject photos; `decoders` threads prepare the next ones while the encoder computes."""

    def __init__(
        self, params: SimilarityParams, variant: str, sources: Sequence[SourceParams], device: str, decoders: int = 0
    ) -> None:
        self.params, self.roots, self.decoders = params, Roots(sources), decoders
        self.encoder = load_encoder(params.encoder, params.spec(variant), device, params.batch_size)

    def compute(self, payloads: Sequence[list[dict[str, Any]]]) -> list[Rows]:
        frames = [frame for payload in payloads for frame in payload]
        for source in {frame["source"] for frame in frames}:
            self.roots[source]  # opened here, not concurrently by several threads
        size = self.params.batch_size
        prepared = prefetch(self.prepare, frames, self.decoders, 2 * size)
        vectors = (v for batch in chunks(prepared, size) for v in self.encoder.embed(batch).cpu().numpy())
        rows = iter(
            {
                "frame_id": frame["frame_id"],
                "subject_id": frame["subject_id"],
                "encoder": self.encoder.name,
                "vector": vector.astype(np.float16),
            }
            for frame, vector in zip(frames, vectors, strict=True)
        )
        return [{"embeddings": [next(rows) for _ in payload]} for payload in payloads]

    def prepare(self, frame: dict[str, Any]) -> torch.Tensor:
        """Return the subject on a white square, as the encoder's input; called by threads."""
        return self.encoder.prepare(on_white(*segments.read_segment(self.roots, frame), margin=self.params.margin))


def chunks(items: Iterator[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    """Yield lists of `size` items, the last one possibly shorter."""
    while chunk := list(islice(items, size)):
        yield chunk
