"""Stage: photos of triplets -> outputs of the frozen encoders (latents and hidden states), computed once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from model.backbones.features.source import FeatureParams, FeatureSource
from model.backbones.identity import spec_digest
from model.backbones.variant import Variant, load_variant
from pipelines import tables
from pipelines.encode import STAGE
from pipelines.encode.needs import Needed, photos_in_shard, sizes, within_budget
from pipelines.encode.worker import EncodeParams, EncodeWorker
from pipelines.engine import driver, subjects
from pipelines.photos import segments
from pipelines.photos.roots import SourceParams
from runtime.params import Params

TABLES = ("latents", "features")
NOT_OF_A_ROW = {"max_gigabytes", "shard_subjects", "latents", "hidden_states", "inputs"}
"""Params that decide which rows exist, not their content."""


def encoded_frames(out: Path) -> int:
    """Return how many photos have a latent or hidden states."""
    return len(pc.unique(pa.concat_tables(tables.read(out, name, ["frame_id"]) for name in TABLES)["frame_id"]))


def identity(encode: EncodeParams, variant: Variant, source: FeatureSource) -> list[Any]:
    """Return what the rows depend on beside the photos: params, code, the side of the crops, weights."""
    weights = [spec_digest(variant.diffusion), source.digest]
    return [encode.model_dump(exclude=NOT_OF_A_ROW), STAGE.code(), variant.resolution, weights]


def main(params: Params) -> None:
    """Run the stage."""
    encode, run = params.section("encode", EncodeParams), params.run
    sources = params.section("sources", list[SourceParams])
    variant, reader = load_variant(params.variant), params.section("model", FeatureParams)
    source = reader.source(variant)
    out, mask = params.data / STAGE.name, params.data / "mask"
    needed = Needed.read(params.data / "pairs", mask, encode)
    row = sizes(variant, source)
    encode = within_budget(encode, row, needed)
    with driver.sole_writer(STAGE.name, run, out):
        summary = driver.run_stage(
            STAGE.name,
            subjects.items(params.data / "curate", segments.FRAME_COLUMNS, needed.wanted(encode, mask)),
            partial(EncodeWorker, encode, reader, params.variant, sources, run.torch_device(), run.decoders),
            identity=identity(encode, variant, source),
            kept="latents",
            others=["features"],
            out=out,
            run=run,
            shard_items=encode.shard_subjects,
            shard_photos=photos_in_shard(encode, row),
        )
        summary.kept = encoded_frames(out)  # a photo may be a target, an input or both
        driver.report(STAGE.name, summary, out, {name: tables.count(out, name) for name in TABLES})
