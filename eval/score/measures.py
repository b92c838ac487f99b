"""The metrics by name: what each says of the pictures of a subject, and which models that takes; see docs/metrics.md.

A metric is a row of MEASURES, or one of the three that an image encoder gives: `<encoder>_i`, the cosines of segments
to the subject's segmented photos; `<encoder>_i_whole`, those of whole pictures and photos; `<encoder>_t`, the cosine of
picture and prompt, of an encoder that reads text.
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
    """A metric: its value of each picture, [G], NaN where it says nothing."""

    values: Callable[[ScoredImages], np.ndarray]
    models: tuple[str, ...] = ()
    """What it computes with: image encoders by name, `reward`, `lpips`."""
    segments: bool = False
    """Whether it looks at segments: then the miss policy decides where the subject was not found."""


def similarity(pictures: ScoredImages, encoder: str, segmented: bool) -> np.ndarray:
    """Mean cosine to the subject's photos."""
    return metrics.mean_cosines(pictures.cosines(encoder, segmented), pictures.compared)


def controllability(pictures: ScoredImages, encoder: str) -> np.ndarray:
    """Cosine to the prompt."""
    return pictures.prompt_cosines(encoder)


def reward(pictures: ScoredImages) -> np.ndarray:
    """ImageReward of picture and prompt."""
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
    """How much nearer, by DINO, a segment is to the crop that its maker saw than to the subject's other photos."""
    photos = pictures.photo_vectors("dino", segmented=True)
    cosines = pictures.cosines("dino", segmented=True)
    shown, compared = pictures.shown, pictures.compared
    if not pictures.work.real:
        return metrics.copy_excess(cosines, photos @ photos.T, shown, compared)
    # A real photo stands for a picture made from one reference: each in turn, and their mean where there are several.
    each = [
        metrics.copy_excess(cosines, photos @ photos.T, shown & (np.arange(len(photos)) == number), compared)
        for number in range(len(photos))
    ]
    return np.ma.masked_invalid(each).mean(axis=0).filled(np.nan)


MEASURES: dict[str, Measure] = {
    "reward": Measure(reward, ("reward",)),
    "lpips": Measure(lpips, ("lpips",)),
    "diversity": Measure(diversity, ("dino",)),
    "copy_paste": Measure(copy_paste, ("dino",), segments=True),
}


def measure(name: str, encoders: Mapping[str, Kind]) -> Measure:
    """Return the metric of that name; `encoders` are those at hand, by name.

    Raises:
        UserError: there is none.
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
    raise UserError(f"score.metrics names '{name}'; it may hold {', '.join(known)}; score.encoders adds encoders")
