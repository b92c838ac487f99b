"""The encoders on trial: those of the score stage, and the vectors of photos and images as it computes them."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
from PIL import Image

from eval.protocol.protocol import HeldOutSubject
from eval.score.metrics import copy_excess
from eval.score.scorer import ScoreParams, Scorer, load_scorer, specs
from eval.score.stage import names
from eval.score.views import ScoredImage, ScoringWork
from eval.trial.record import Result
from model.backbones.encoders import Kind
from model.backbones.variant import load_variant
from pipelines import tables
from pipelines.photos.roots import Roots, SourceParams
from runtime.cli import shared_options
from runtime.errors import UserError
from runtime.params import Params, parse

COPY_PASTE = "copy_paste"
Vectors = dict[str, np.ndarray]
"""By metric, the unit vectors [N, d] whose cosines it averages."""


def encoder_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every trial."""
    parser.add_argument(
        "--encoder",
        action="append",
        nargs="+",
        default=[],
        metavar=("NAME", "KIND PATH [REVISION]"),
        help=f"add an encoder to score.encoders; KIND: {', '.join(get_args(Kind))}",
    )
    shared_options(parser)


def trial_params(params: Params, added: list[list[str]]) -> ScoreParams:
    """Return section score with the similarities of every encoder as its metrics, and copy_paste.

    added: NAME, KIND, PATH and perhaps REVISION of further encoders.

    Raises:
        UserError: an encoder is described by fewer or more words, or not valid.
    """
    score = params.section("score", ScoreParams).model_dump()
    for words in added:
        if not 3 <= len(words) <= 4:
            raise UserError(f"--encoder {' '.join(words)}: give NAME KIND PATH, and REVISION of a hub repository")
        name, kind, path, *revision = words
        score["encoders"][name] = {"kind": kind, "path": path, "revision": revision[0] if revision else None}
    kinds = parse("score", score, ScoreParams).kinds()
    return parse("score", score | {"metrics": [*similarities(kinds), COPY_PASTE]}, ScoreParams)


def similarities(encoders: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """Return (encoder, whether of segments) of each similarity metric."""
    return {
        f"{encoder}_i{'' if segmented else '_whole'}": (encoder, segmented)
        for encoder in encoders
        for segmented in (True, False)
    }


def load(params: Params, score: ScoreParams) -> tuple[Scorer, dict[str, str]]:
    """Return the scorer, which reads photos of the sources of `params`, and the id of each encoder's weights."""
    variant, run = load_variant(params.variant), params.run
    roots = Roots(params.section("sources", list[SourceParams]))
    return load_scorer(score, variant, roots, run.torch_device(), run.decoders), names(specs(score, variant))


def photo_vectors(scorer: Scorer, subject: HeldOutSubject) -> Vectors:
    """Return the vectors of a subject's photos, which have masks."""
    view = scorer.pictures(ScoringWork("trial", subject, subject.photos, (), leave_out=False))
    return {metric: view.photo_vectors(*of) for metric, of in similarities(scorer.params.kinds()).items()}


def image_vectors(scorer: Scorer, images: Iterable[tuple[np.ndarray, np.ndarray]]) -> Vectors:
    """Return the vectors of images [H, W, 3] uint8 with their masks [H, W] bool, seen as generated images."""
    pictures = tuple(
        ScoredImage("trial", 0, number, None, (), {"image": _png(image)}, _segmentation(mask))
        for number, (image, mask) in enumerate(images)
    )
    view = scorer.pictures(ScoringWork("trial", HeldOutSubject("", "", ()), (), pictures, leave_out=False))
    return {metric: view.vectors(*of) for metric, of in similarities(scorer.params.kinds()).items()}


def excess(vectors: np.ndarray, photos: Sequence[int], images: Sequence[int]) -> np.ndarray:
    """Return the metric copy_paste of images of a subject that were made from its first photo, [images].

    vectors: unit vectors [N, d] of segments, of which `photos` and `images` are rows.
    """
    found, compared = vectors[list(images)], vectors[list(photos)]
    shown = np.zeros((len(found), len(compared)), dtype=bool)
    shown[:, 0] = True
    return copy_excess(found @ compared.T, compared @ compared.T, shown, np.ones_like(shown))


def stacked(vectors: list[Vectors]) -> Vectors:
    """Return the vectors of several subjects, one after another."""
    return {metric: np.concatenate([of[metric] for of in vectors]) for metric in vectors[0]}


def result(
    name: str, question: str, score: ScoreParams, weights: Mapping[str, str], tables: list[dict[str, Any]]
) -> Result:
    """Return the result of a trial, as `record` stores it."""
    measures = {metric: encoder for metric, (encoder, _) in similarities(score.kinds()).items()}
    return {
        "name": name,
        "question": question,
        "encoders": dict(weights),
        "measures": measures | {COPY_PASTE: "dino"},
        "settings": score.model_dump(mode="json", include={"margin", "dtype", "photo_quality"}),
        "intervals": score.intervals.model_dump(),
        "tables": tables,
    }


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _segmentation(mask: np.ndarray) -> dict[str, Any]:
    """What metrics read of a row of the segmentations table."""
    height, width = mask.shape
    return {"segmented": bool(mask.any()), "rle": tables.encode_mask(mask), "height": height, "width": width}
