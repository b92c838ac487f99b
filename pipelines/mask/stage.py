"""Stage: frames -> a mask for each, shipped with the photo or cut out by Grounded SAM."""

from __future__ import annotations

from functools import partial

import numpy as np

from model.backbones.identity import spec_digest
from model.backbones.variant import load_variant
from pipelines import tables
from pipelines.engine import driver, subjects
from pipelines.mask import STAGE, quality
from pipelines.mask.worker import MaskParams, MaskWorker
from pipelines.photos.roots import SourceParams
from runtime.params import Params

COLUMNS = ("source", "class_name", "path", "mask_path", "mask_sha256", "box")
"""mask_sha256 is only for the fingerprint of a subject: a different shipped mask is a different input."""


def main(params: Params) -> None:
    """Run the stage."""
    mask, run = params.section("mask", MaskParams), params.run
    sources = params.section("sources", list[SourceParams])
    variant = load_variant(params.variant)
    out = params.data / STAGE.name
    with driver.sole_writer(STAGE.name, run, out):
        summary = driver.run_stage(
            STAGE.name,
            subjects.items(params.data / "curate", COLUMNS),
            partial(MaskWorker, mask, params.variant, sources, run.torch_device(), run.decoders),
            identity=[mask.model_dump(), STAGE.code(), [spec_digest(spec) for spec in (variant.detector, variant.sam)]],
            kept="masks",
            others=["agreement"],
            out=out,
            run=run,
            shard_items=mask.shard_subjects,
        )
        made = tables.read(out, "masks", ["method", "quality", "area"])
        agreement = quality.summary(tables.read(out, "agreement", ["iou"]).to_pylist())
        extra = {
            "method": tables.count_by(made["method"].to_pylist()),
            "quality": tables.count_by(made["quality"].to_pylist()),
            "mean_area": round(float(np.mean(made["area"].to_numpy())), 4) if made.num_rows else 0.0,
            "agreement": agreement,
        }
        driver.report(STAGE.name, summary, out, extra)
    if agreement["photos"]:
        print(
            f"mask: annotated vs. Grounded SAM: mean IoU {agreement['mean_iou']}, median {agreement['median_iou']}"
            f" over the {agreement['both']} of {agreement['photos']} photos with both masks"
        )
