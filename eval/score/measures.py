"""The metrics by name: how each is computed for a subject's images, and with which models; see docs/metrics.md.

A metric is a row of MEASURES, or one of three per image encoder: `<encoder>_i`, cosines of segments to the subject's
segmented photos; `<encoder>_i_whole`, cosines of whole images to whole photos; `<encoder>_t`, the cosine of image and
prompt, for an encoder that reads text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from eval.score import metrics
from eval.score.views import ScoredImages
from model.backbones.encoders import Kind
from runtime.errors import UserError


@dataclass(frozen=True)
class Measure:
    """A metric: its value for each image, [G]; NaN where it is undefined."""

    values: Callable[[ScoredImages], np.ndarray]
    models: tuple[str, ...] = ()
    """Models it uses: image encoders by name, `reward`, `lpips`."""
    segments: bool = False
    """Whether it reads segments: the miss policy then applies where the subject was not found."""


def similarity(pictures: ScoredImages, encoder: str, segmented: bool) -> np.ndarray:
    """Mean cosine to the subject's photos."""
    return metrics.mean_cosines(pictures.cosines(encoder, segmented), pictures.compared)


def controllability(pictures: ScoredImages, encoder: str) -> np.ndarray:
    """Cosine to the prompt."""
    return pictures.prompt_cosines(encoder)


def reward(pictures: ScoredImages) -> np.ndarray:
    """ImageReward of image and prompt."""
    return pictures.rewards()


def lpips(pictures: ScoredImages) -> np.ndarray:
    """Mean LPIPS to the other seeds of the prompt."""
    return metrics.mean_to_siblings(pictures.distances(), pictures.siblings)


def diversity(pictures: ScoredImages) -> np.ndarray:
    """Mean DINO distance, 1 - cosine, to the other seeds of the prompt."""
    if not pictures.have_siblings:
        return np.full(len(pictures), np.nan)
    vectors = pictures.vectors("dino", segmented=False)
    return metrics.mean_to_siblings(1 - vectors @ vectors.T, pictures.siblings)


def copy_paste(pictures: ScoredImages) -> np.ndarray:
    """How much closer, by DINO, a segment is to its reference crop than to the subject's other photos."""
    photos = pictures.photo_vectors("dino", segmented=True)
    cosines = pictures.cosines("dino", segmented=True)
    shown, compared = pictures.shown, pictures.compared
    if not pictures.work.real:
        return metrics.copy_excess(cosines, photos @ photos.T, shown, compared)
    # A real photo stands for an image generated from one reference: each in turn, averaged if there are several.
    each = [
        metrics.copy_excess(cosines, photos @ photos.T, shown & (np.arange(len(photos)) == number), compared)
        for number in range(len(photos))
    ]
    return np.ma.masked_invalid(each).mean(axis=0).filled(np.nan)


FACE = "face"
"""The face recogniser of the variant's `face_metric`, beside the encoders of section score."""
MEASURES: dict[str, Measure] = {
    "reward": Measure(reward, ("reward",)),
    "lpips": Measure(lpips, ("lpips",)),
    "diversity": Measure(diversity, ("dino",)),
    "copy_paste": Measure(copy_paste, ("dino",), segments=True),
    "face_i": Measure(partial(similarity, encoder=FACE, segmented=True), (FACE,), segments=True),
}


def measure(name: str, encoders: Mapping[str, Kind]) -> Measure:
    """Return the metric of that name; `encoders`: the available ones, by name.

    Raises:
        UserError: there is no such metric.
    """
    if name in MEASURES:
        return MEASURES[name]
    encoder, _, view = name.rpartition("_i") if not name.endswith("_t") else (name[:-2], "", "_t")
    if encoder in encoders and view in ("", "_whole"):
        segmented = view == ""
        return Measure(partial(similarity, encoder=encoder, segmented=segmented), (encoder,), segments=segmented)
    if encoder in encoders and view == "_t" and encoders[encoder] == "clip":
        return Measure(partial(controllability, encoder=encoder), (encoder,))
    readers = [key for key, kind in encoders.items() if kind == "clip"]
    known = [*MEASURES, *(f"{key}_t" for key in readers), *(f"{key}_i, {key}_i_whole" for key in encoders)]
    raise UserError(
        f"score.metrics names '{name}'; choose from {', '.join(known)}, or add an encoder to score.encoders"
    )
