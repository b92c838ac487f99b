"""Which photos may be a reference, positive or target: those whose mask holds and whose subject stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables

NO_MASK = "no_mask"
"""Why a photo without a row of the masks table is not used; mask's rejects say more."""


def training_frames(
    curate: Path, mask: Path, similarity: Path, columns: Sequence[str], reasons: Counter[str] | None = None
) -> Iterator[pa.Table]:
    """Yield the frames of split train that may be used, in key order.

    A photo may be used where the quality of its mask is ok and `similarity` did not reject it, as it does with a
    subject that repeats another one. What is held does not grow with the tables.

    Args:
        columns: of the frames table.
        reasons: takes how many photos may not be used, by reason: the quality of the mask, no_mask, or the reason of
            similarity.
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
    """Yield stretches of the frames table and the quality of each photo's mask, null without one.

    Both tables are in the order of the frame ids, so that the masks of a stretch are found by going along with it.
    """
    masks = tables.stream(mask, "masks", ["frame_id", "quality"])
    wanted = list(dict.fromkeys(["frame_id", "split", *columns]))
    held: list[pa.Table] = []  # the last one may reach beyond the stretch
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
