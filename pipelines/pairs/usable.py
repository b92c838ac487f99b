"""Photos usable as reference, positive or target: their mask is ok and their subject is not dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables

NO_MASK = "no_mask"
"""Reason for a photo without a row in the masks table; the rejects of mask have details."""


def training_frames(
    curate: Path, mask: Path, similarity: Path, columns: Sequence[str], reasons: Counter[str] | None = None
) -> Iterator[pa.Table]:
    """Yield the usable frames of split train, in key order.

    A photo is usable if the quality of its mask is ok and `similarity` did not reject it, as it does with a subject
    that repeats another one. Memory does not grow with the tables.

    Args:
        columns: of the frames table.
        reasons: updated with the number of unusable photos by reason: the quality of the mask, no_mask, or the reason
            of similarity.
    """
    rejects = tables.read(similarity, "rejects", ["id", "reason"])
    for frames, quality in _with_quality(curate, mask, columns):
        rejected = pc.index_in(frames["frame_id"], value_set=rejects["id"].combine_chunks())
        reason = pc.coalesce(rejects["reason"].combine_chunks().take(rejected.combine_chunks()), quality)
        reason = pc.fill_null(reason, NO_MASK)
        training = pc.equal(frames["split"], "train")
        good = pc.and_(training, pc.equal(reason, "ok"))
        if reasons is not None:
            wrong = pc.and_(training, pc.not_equal(reason, "ok"))
            reasons.update(pa.chunked_array([reason]).filter(pa.chunked_array([wrong])).to_pylist())
        found = frames.filter(good).select(list(columns))
        if found.num_rows:
            yield found


def _with_quality(curate: Path, mask: Path, columns: Sequence[str]) -> Iterator[tuple[pa.Table, pa.Array]]:
    """Yield chunks of the frames table and the quality of each photo's mask, null without one.

    Both tables are sorted by frame_id, so that the masks of a chunk are found by reading them in parallel.
    """
    masks = tables.stream(mask, "masks", ["frame_id", "quality"])
    wanted = list(dict.fromkeys(["frame_id", "split", *columns]))
    held: list[pa.Table] = []  # the last one may extend beyond the chunk
    for frames in tables.stream(curate, "frames", wanted):
        frames = frames.combine_chunks()
        last = tables.path_order(frames["frame_id"][-1].as_py())
        while not held or tables.path_order(held[-1]["frame_id"][-1].as_py()) < last:
            following = next((piece for piece in masks if len(piece)), None)
            if following is None:
                break
            held.append(following)
        if held:
            known = pa.concat_tables(held).combine_chunks()
            place = pc.index_in(frames["frame_id"], value_set=known["frame_id"].combine_chunks())
            yield frames, known["quality"].combine_chunks().take(place.combine_chunks())
        else:
            yield frames, pa.nulls(len(frames), pa.string())
        held = held[-1:]
