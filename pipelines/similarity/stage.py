"""Stage: segmented subjects -> embeddings, and cosine tiles between subjects (the M of MACL's scaling factors)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow.compute as pc
import torch

from model.backbones.identity import spec_digest
from pipelines import tables
from pipelines.engine import driver, subjects
from pipelines.photos import segments
from pipelines.photos.roots import SourceParams
from pipelines.similarity import STAGE, repeats
from pipelines.similarity.tiles import Overview, alike, prototypes, tiles
from pipelines.similarity.worker import SimilarityParams, SimilarityWorker
from runtime.params import Params


def drop_repeats(out: Path, curate: Path, params: SimilarityParams) -> None:
    """Move the embeddings of subjects that repeat another one to the rejects."""
    ids, vectors = prototypes(out)
    frames = tables.read(curate, "frames", ["subject_id", "split"])
    test = set(pc.unique(frames.filter(pc.equal(frames["split"], "test"))["subject_id"]).to_pylist())
    found = repeats.same_subjects(ids, *alike(vectors, params), test)
    reasons = {repeat: ("same_subject", f"{kept} {cosine:.4f}") for repeat, (kept, cosine) in found.items()}
    tables.move_to_rejects(out, "embeddings", "subject_id", reasons, "similarity")


def main(params: Params) -> None:
    """Run the stage."""
    similarity, run = params.section("similarity", SimilarityParams), params.run
    sources = params.section("sources", list[SourceParams])
    out, curate = params.data / STAGE.name, params.data / "curate"
    embedding = similarity.model_dump(include={"encoder", "weights", "margin", "batch_size"})
    with driver.sole_writer(STAGE.name, run, out):
        summary = driver.run_stage(
            STAGE.name,
            subjects.items(curate, segments.FRAME_COLUMNS, segments.usable(params.data / "mask")),
            partial(SimilarityWorker, similarity, params.variant, sources, run.torch_device(), run.decoders),
            identity=[embedding, STAGE.code(), spec_digest(similarity.spec(params.variant))],
            kept="embeddings",
            others=[],
            out=out,
            run=run,
            shard_items=similarity.shard_subjects,
        )
        torch.set_num_threads(run.threads)  # as in the workers: another number may round differently
        if similarity.same_subject is not None:
            drop_repeats(out, curate, similarity)
            driver.settle(summary, out, "embeddings")
        ids, vectors = prototypes(out)
        overview = Overview(len(ids), similarity.neighbours)
        tables.write_parts(out, "similarity", tiles(ids, vectors, similarity, overview))
        tables.write_parts(out, "neighbours", [overview.neighbours(ids)])
        extra = {"subjects": len(ids), "tiles": overview.tiles, "mean_cosine": overview.mean()}
        driver.report(STAGE.name, summary, out, extra)
