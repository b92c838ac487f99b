"""Why photos are dropped: the closed list of reasons, and rows of the rejects table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.tables import files

SHOWN = ("source", "path", "box")
"""Columns the report needs to show a dropped photo."""

REJECT_REASONS: dict[str, str] = {
    # decided from metadata by a source reader
    "no_annotation": "the annotations lack the photo's box, class or time",
    "missing_file": "the annotations name a photo that is not there",
    "bad_box": "the box is empty or outside the photo",
    "not_an_image": "the file is not an image",
    "not_a_video": "the file is not a video",
    # decided by curate from the annotations, before the photo is opened
    "class_not_wanted": "the class is not among the wanted ones",
    "licence_not_allowed": "the photo's licence is not among curate.licences",
    "occluded": "annotators say that something hides part of the subject",
    "truncated": "annotators say that the subject goes on outside the photo",
    "group_of": "annotators say that the box holds a group, not one subject",
    "depiction": "annotators say that the box holds a picture of the subject",
    "inside": "annotators say that the photo was taken inside the subject",
    "several_instances": "the photo holds more boxes of the class than curate.filters.max_instances",
    "subject_small": "the box covers less than curate.filters.min_subject_area",
    "subject_large": "the box covers more than curate.filters.max_subject_area",
    "subject_cut": "the box touches more sides of the photo than curate.filters.max_cut_sides",
    # decided by curate from the pixels
    "empty": "the file has no bytes",
    "unreadable": "the file cannot be decoded as an image",
    "no_frame": "the video shows no frame in that part of its time: it has fewer than curate.video.frames",
    "huge": "the photo has more pixels than curate.max_pixels",
    "too_small": "the shorter side is below curate.filters.min_side",
    "bad_aspect": "the longer side is more than curate.filters.max_aspect times the shorter",
    "blurred": "sharpness is below curate.filters.min_sharpness",
    "bad_exposure": "the photo is nearly black, nearly white or without contrast",
    "near_duplicate": "a frame of the same subject looks the same",
    "duplicate": "a photo of another subject is the same picture",
    "too_few_views": "the subject has fewer good frames than curate.min_views",
    # decided by mask
    "mask_unreadable": "the shipped mask cannot be read or has another shape than the photo",
    "mask_missing": "no mask was shipped and none was found",
    "mask_empty": "the mask has no pixel",
    "phrase_too_long": "the class noun has more tokens than the detector reads",
    # decided by similarity
    "same_subject": "another subject is the same object: the cosine is at least similarity.same_subject",
    # decided by selfaugment
    "unknown_name": "the faces of the name's plain pictures differ: the base model does not know it",
    "no_face": "no face is found in the picture",
    "several_faces": "the picture shows more than one face",
    "another_person": "the face is not that of the person's plain pictures",
    "prompt_missed": "the picture shows less of its prompt than most",
    # decided by the engine
    "crashed": "the photo made its worker die each time it was tried",
}


def reject(
    frame_id: str,
    stage: str,
    reason: str,
    detail: str = "",
    source: str | None = None,
    path: str | None = None,
    box: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Return a row of the rejects table; `reason` must be a key of REJECT_REASONS.

    source, path and box let the report show a photo that has no row in the frames table.
    """
    if reason not in REJECT_REASONS:
        raise KeyError(f"'{reason}' is not in REJECT_REASONS")
    row = {"id": frame_id, "stage": stage, "reason": reason, "detail": detail}
    return row | {"source": source, "path": path, "box": list(box) if box else None}


def move_to_rejects(folder: Path, name: str, key: str, reasons: Mapping[str, tuple[str, str]], stage: str) -> None:
    """Move the rows of a table whose `key` is in `reasons` to the rejects, with their reason and detail."""
    rejects = [files.read(folder, "rejects")]
    for part in files.parts(folder, name):
        table = files.read_part(part, name)
        dropped = pc.is_in(table[key], pa.array(list(reasons), pa.string()))
        if pc.any(dropped).as_py():
            columns = [c for c in dict.fromkeys((key, "frame_id", *SHOWN)) if c in table.column_names]
            rows = [
                reject(row["frame_id"], stage, *reasons[row[key]], *(row.get(column) for column in SHOWN))
                for row in table.filter(dropped).select(columns).to_pylist()
            ]
            rejects.append(files.from_rows("rejects", rows))
            files.write_part(part, name, table.filter(pc.invert(dropped)))  # a new file: the shard keeps its own
    files.write(folder, "rejects", pa.concat_tables(rejects))
