"""How much the benchmark measures, and with which params."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from params import BackbonesParams, RunParams, Section, load
from pipelines.curate import CurateParams
from pipelines.mask import MaskParams
from pipelines.similarity import SimilarityParams


class Sizes(Section):
    """How much is measured; the fields are options of the command."""

    repeats: int  # the median counts
    photos: int  # for decode, workers and others
    side: int  # px, longer side of those photos
    source: str | None  # folder in MVImgNet's layout to take photos from instead of drawing them
    model_photos: int  # for mask and embed, at the resolution of the variant
    subjects: int  # for tile
    width: int  # of an embedding, for tile
    shards: int  # for engine
    rows: tuple[int, ...]  # for scale: frames, in rising order
    work: Path  # folder of photos and tables of the benchmark


@dataclass(frozen=True)
class Setting:
    """What a part of the benchmark is given: sizes, and the stages' own params."""

    sizes: Sizes
    run: RunParams
    variant: str
    curate: CurateParams
    mask: MaskParams
    similarity: SimilarityParams

    @classmethod
    def of(cls, sizes: Sizes) -> Setting:
        """Return the setting of this command line."""
        return cls(
            sizes,
            load("run", RunParams),
            load("backbones", BackbonesParams).variant,
            load("curate", CurateParams),
            load("mask", MaskParams),
            load("similarity", SimilarityParams),
        )
