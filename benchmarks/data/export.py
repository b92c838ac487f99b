"""Part that measures export-pairs: its overhead over cutting and encoding, and the speed-up from a second worker."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.data import photos
from benchmarks.data.engine import two_over_one
from benchmarks.data.setting import DataSetting
from benchmarks.measure import Line, ratio
from pipelines.curate.stage import CurateWorker, pack
from pipelines.engine.items import Item
from pipelines.export.options import ExportOptions
from pipelines.export.plan import Part, plan
from pipelines.export.render import encoded, render
from pipelines.export.worker import ExportWorker
from pipelines.mask.worker import MaskWorker
from pipelines.photos.roots import Roots, SourceParams

FORMAT = "webdataset"
OPTIONS = ExportOptions(size=512, part=16)
"""At 512 px, with shards small enough that two workers share them."""


def export(setting: DataSetting) -> Iterator[Line]:
    """Pairs/s of the export's worker over those of reading, cutting and encoding the same images; then of two workers
    over one, while both are busy."""
    source, items = shards(setting)
    pairs = [pair for item in items for pair in item.payload.pairs]
    roots = Roots([source])

    def plain() -> None:
        for pair in pairs:
            for made in render(roots, pair, OPTIONS).values():
                encoded(made.image, OPTIONS)

    with tempfile.TemporaryDirectory(dir=setting.sizes.work) as out:
        worker = ExportWorker(FORMAT, OPTIONS, [source], out)

        def ours() -> None:
            for item in items:
                worker.compute([item.payload])

        yield ratio("export over image encoding", ours, plain, len(pairs), "pair", 0.8, setting.sizes.repeats)
        make = partial(ExportWorker, FORMAT, OPTIONS, [source], str(Path(out).absolute()))
        yield two_over_one("export, two workers over one", setting, make, items, count_pairs, "pair", "exports")


def count_pairs(part: Part) -> int:
    """Return the number of pairs in a shard."""
    return len(part.pairs)


def shards(setting: DataSetting) -> tuple[SourceParams, list[Item]]:
    """Return synthetic photos with masks, and the shards of an export: each photo is a target, the next its
    reference."""
    sizes = setting.sizes
    source = photos.drawn(sizes.work, sizes.photos, (sizes.side, sizes.side * 3 // 4))
    subjects = [pack(subject) for subject in photos.subjects(source, sizes.photos)]
    made = CurateWorker(setting.curate, [source], "cpu").compute(subjects)
    frames = [rows["frames"] for rows in made if rows["frames"]]
    params = setting.mask.model_copy(update={"method": "annotated", "compare": 0.0})
    masks = MaskWorker(params, setting.variant, [source], "cpu").compute(frames)
    items, triplets = [], []
    for rows, found in zip(frames, masks, strict=True):
        of_frame = {row["frame_id"]: row for row in found["masks"]}
        masked = [frame | {"extra": of_frame[frame["frame_id"]]} for frame in rows if frame["frame_id"] in of_frame]
        subject_id, ids = rows[0]["subject_id"], tuple(frame["frame_id"] for frame in masked)
        items.append(Item(subject_id, "", ids, masked))
        triplets += [triplet(subject_id, ids, place) for place in range(len(ids))]
    return source, list(plan(triplets, items, OPTIONS))


def triplet(subject_id: str, ids: tuple[str, ...], place: int) -> dict[str, Any]:
    """Return the row of a triplet whose target is at `place` among a subject's frames."""
    following = ids[(place + 1) % len(ids)]
    row = {"triplet_id": f"{subject_id}/{place:03d}", "subject_id": subject_id, "class_name": "ball"}
    row |= {"reference": following, "positive": following, "target": ids[place], "method": "order"}
    return row | {"reference_target_angle": None, "reference_positive_angle": None}
