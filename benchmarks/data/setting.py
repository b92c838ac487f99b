"""How much the benchmark measures, and with which params."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipelines.curate.worker import CurateParams
from pipelines.mask.worker import MaskParams
from pipelines.similarity.worker import SimilarityParams
from runtime.params import Params, RunParams, Section


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
    words: list[str]
    """Options that make another command read the same params."""
    run: RunParams
    variant: str
    curate: CurateParams
    mask: MaskParams
    similarity: SimilarityParams

    @classmethod
    def of(cls, sizes: Sizes, params: Params) -> Setting:
        """Return the setting of a command line."""
        return cls(
            sizes,
            params.words(),
            params.run,
            params.variant,
            params.section("curate", CurateParams),
            params.section("mask", MaskParams),
            params.section("similarity", SimilarityParams),
        )
