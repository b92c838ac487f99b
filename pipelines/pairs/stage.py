"""Stage: frames and usable masks -> triplets (reference, positive, target)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables
from pipelines.engine import driver
from pipelines.pairs import STAGE, triplets
from pipelines.pairs.triplets import TripletParams
from pipelines.pairs.usable import training_frames
from runtime.errors import UserError
from runtime.files import write_metrics
from runtime.params import Params


def main(params: Params) -> None:
    """Run the stage.

    Raises:
        UserError: no photo is usable.
    """
    pairs, out = params.section("pairs", TripletParams), params.data / STAGE.name
    curate, mask, similarity = (params.data / stage for stage in ("curate", "mask", "similarity"))
    reasons: Counter[str] = Counter()
    with driver.sole_writer(STAGE.name, params.run, out):
        kept = subjects(training_frames(curate, mask, similarity, ["subject_id"], reasons))
        all_subjects = subjects(training(params))
        photos = sum(kept.values()) + reasons.total()
        if photos and not kept:
            raise UserError(
                f"none of the {photos} training photos in {curate} is usable ({listed(reasons)});"
                " see the rejects and masks tables, and correct the photos or the params of curate and mask"
            )
        triplets.write(partial(training_frames, curate, mask, similarity, triplets.COLUMNS), out, pairs)
        made = tables.read(out, "triplets", ["subject_id", "method"])
        methods = tables.count_by(made["method"].to_pylist())
        values = {
            "photos": photos,
            "photos_used": sum(kept.values()),
            "not_usable": dict(sorted(reasons.items())),
            "subjects": len(kept),
            "subjects_without_photo": len(all_subjects.keys() - kept.keys()),
            "subjects_without_a_role": len(kept) - len(pc.unique(made["subject_id"])),
            "subjects_left_with_one_photo": sum(all_subjects[name] > 1 for name, count in kept.items() if count == 1),
            "triplets": len(made),
            "methods": methods,
        }
        write_metrics(out, values, {"input": photos, "kept": sum(kept.values()), "rejected": reasons.total()})
    print(f"pairs: {len(made)} triplets of {len(kept)} subjects: {listed(methods)}")
    if reasons:
        print(f"  {reasons.total()} of {photos} photos not usable: {listed(reasons)}")
    for name, meaning in (
        ("subjects_without_photo", "subjects have no usable photo and no triplet"),
        ("subjects_without_a_role", "subjects have references only, or targets only, and no triplet"),
        ("subjects_left_with_one_photo", "subjects keep one of several photos; augmentations stand in for other views"),
    ):
        if values[name]:
            print(f"  {values[name]} {meaning}")


def training(params: Params) -> Iterator[pa.Table]:
    """Yield the subjects of all training photos, in key order."""
    for frames in tables.stream(params.data / "curate", "frames", ["subject_id", "split"]):
        yield frames.filter(pc.equal(frames["split"], "train"))


def subjects(frames: Iterator[pa.Table]) -> dict[str, int]:
    """Return the number of photos of each subject."""
    counts: Counter[str] = Counter()
    for chunk in frames:
        for row in pc.value_counts(chunk["subject_id"]).to_pylist():
            counts[row["values"]] += row["counts"]
    return dict(counts)


def listed(counts: dict[str, Any]) -> str:
    """Return counts as one line of text."""
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
