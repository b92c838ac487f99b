"""Sizes and params of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipelines.curate.worker import CurateParams
from pipelines.mask.worker import MaskParams
from pipelines.similarity.worker import SimilarityParams
from runtime.params import Params, RunParams, Section


class Sizes(Section):
    """Sizes of the measurements; the fields are options of the command."""

    repeats: int  # of which the median counts
    photos: int  # for decode, workers, export and others
    side: int  # px, longer side of those photos
    source: str | None  # folder of photos in MVImgNet's layout, instead of synthetic ones
    model_photos: int  # for mask and embed, at the resolution of the variant
    subjects: int  # for tile
    width: int  # of an embedding, for tile
    shards: int  # for engine
    pairs: int  # for export_scale
    rows: tuple[int, ...]  # for scale: numbers of frames, ascending
    work: Path  # folder for the benchmark's photos and tables


@dataclass(frozen=True)
class DataSetting:
    """Inputs of a part: sizes, and the stages' own params."""

    sizes: Sizes
    words: list[str]
    """Command-line options for reading the same params in a subprocess."""
    run: RunParams
    variant: str
    curate: CurateParams
    mask: MaskParams
    similarity: SimilarityParams

    @classmethod
    def of(cls, sizes: Sizes, params: Params) -> DataSetting:
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
