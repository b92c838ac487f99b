"""Parts that compare a stage's worker with the minimum necessary work, in one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import forwards
from benchmarks.data import checkpoints, photos
from benchmarks.data.setting import DataSetting
from benchmarks.measure import Line, ratio
from model.backbones.variant import load_variant
from pipelines.curate.stage import CurateWorker, pack
from pipelines.engine.actors import Worker
from pipelines.mask.worker import MaskParams, MaskWorker
from pipelines.photos.decode import decode_image
from pipelines.photos.roots import Roots, SourceParams
from pipelines.similarity.stage import SimilarityWorker
from pipelines.similarity.tiles import groups, tiles
from pipelines.similarity.worker import SimilarityParams


def decode(setting: DataSetting) -> Iterator[Line]:
    """The curate stage's worker vs reading and decoding the same files."""
    source = photos.source(setting)
    chosen = photos.subjects(source, setting.sizes.photos)
    worker, roots = CurateWorker(setting.curate, [source], "cpu"), Roots([source])
    payloads = [pack(subject) for subject in chosen]
    paths = [photo.path for subject in chosen for photo in subject.photos if photo.reject is None]

    def plain() -> None:
        for path in paths:
            decode_image(roots[source.name].read(path), setting.curate.max_pixels)

    repeats = setting.sizes.repeats
    yield ratio("decode+filter over decode", lambda: worker.compute(payloads), plain, len(paths), "photo", 0.8, repeats)


def mask(setting: DataSetting) -> Iterator[Line]:
    """The mask stage's worker, with Grounded SAM on all photos, vs its forward passes."""
    source, frames = at_resolution(setting)
    params = setting.mask.model_copy(update={"method": "grounded_sam"})
    yield over_forwards("mask over forward", masks(params, setting.variant, source, setting), frames, params, setting)


def newer_masks(setting: DataSetting) -> Iterator[Line]:
    """As `mask`, with an MM-Grounding-DINO and then with a SAM 2 in the places of the variant's models."""
    source, frames = at_resolution(setting)
    # Random weights find nothing, so every box counts.
    params = setting.mask.model_copy(update={"method": "grounded_sam", "min_detection": 0.0})
    work, variant = setting.sizes.work, load_variant(setting.variant)
    parts: dict[str, dict[str, Any]] = {
        "MM-Grounding-DINO": {"detector": checkpoints.mm_grounding_dino(variant.detector, work)},
        "SAM 2": {"sam": checkpoints.sam2(work)},
    }
    for name, part in parts.items():
        file = work / f"{name}.json"
        file.write_text(variant.model_copy(update=part).model_dump_json())
        worker = masks(params, str(file), source, setting)
        yield over_forwards(f"{name} over forward", worker, frames, params, setting)


def masks(params: MaskParams, variant: str, source: SourceParams, setting: DataSetting) -> MaskWorker:
    """Return the mask stage's worker."""
    return MaskWorker(params, variant, [source], setting.run.torch_device(), setting.run.decoders)


def embed(setting: DataSetting) -> Iterator[Line]:
    """The similarity stage's worker vs its forward passes."""
    source, frames = at_resolution(setting)
    params = setting.mask.model_copy(update={"method": "annotated", "compare": 0.0})
    shipped = MaskWorker(params, setting.variant, [source], "cpu").compute(frames)
    segmented = [
        [{**frame, "extra": row} for frame, row in zip(rows, made["masks"], strict=True)]
        for rows, made in zip(frames, shipped, strict=True)
    ]
    run = setting.run
    worker = SimilarityWorker(setting.similarity, setting.variant, [source], run.torch_device(), run.decoders)
    yield over_forwards("embed over forward", worker, segmented, setting.similarity, setting)


def at_resolution(setting: DataSetting) -> tuple[SourceParams, list[list[dict[str, Any]]]]:
    """Return photos at the native resolution of the variant, and their frame rows by subject."""
    side = load_variant(setting.variant).resolution
    source = photos.drawn(setting.sizes.work, setting.sizes.model_photos, (side, side))
    rows = CurateWorker(setting.curate, [source], "cpu").compute(
        [pack(subject) for subject in photos.subjects(source, setting.sizes.model_photos)]
    )
    return source, [made["frames"] for made in rows if made["frames"]]


def over_forwards(
    name: str,
    worker: Worker,
    payloads: Sequence[list[dict[str, Any]]],
    params: MaskParams | SimilarityParams,
    setting: DataSetting,
) -> Line:
    """Return the throughput of a worker, called per shard as by the engine, over that of its forward passes alone."""
    shard = params.shard_subjects

    def work() -> None:
        for start in range(0, len(payloads), shard):
            worker.compute(payloads[start : start + shard])

    work()  # loads the models
    calls = forwards.record(work)
    count = sum(map(len, payloads))
    return ratio(name, work, lambda: forwards.replay(calls), count, "photo", 0.85, setting.sizes.repeats)


def tile(setting: DataSetting) -> Iterator[Line]:
    """The rows of the similarity table vs torch.mm of the same blocks."""
    sizes, params = setting.sizes, setting.similarity
    ids, vectors = similar_subjects(sizes.subjects, sizes.width)
    tensors = torch.from_numpy(vectors)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for grouping in range(params.groupings):
        for members in groups(len(ids), params.group_size, params.seed + grouping):
            blocks = [tensors[members[i : i + params.tile]] for i in range(0, len(members), params.tile)]
            pairs += [(rows, columns) for rows in blocks for columns in blocks]

    def ours() -> None:
        for _ in tiles(ids, vectors, params):
            pass

    def plain() -> None:
        for rows, columns in pairs:
            torch.mm(rows, columns.T)

    yield ratio("tile over torch.mm", ours, plain, len(pairs), "tile", 0.8, sizes.repeats)


def similar_subjects(count: int, width: int) -> tuple[list[str], Any]:
    """Return ids and unit vectors [count, width] that are all slightly similar, like an encoder's."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(count, width, generator=generator) + 0.5, dim=1)
    return [f"bench/{number:07d}" for number in range(count)], vectors.numpy()
