"""Subjects of the frames table as the items that the stages after curate work on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pipelines import shards, tables
from stage import digest


def items(folder: Path, columns: Sequence[str], extra: dict[str, Any] | None = None) -> list[shards.Item]:
    """Return an item for each subject of the frames table in `folder`, its payload the list of its frame rows.

    Args:
        columns: of the frames table that the worker needs; frame_id, subject_id and sha256 come along.
        extra: by frame_id, a further value put into the row as `extra`; frames that are not in it are left out.
    """
    wanted = list(dict.fromkeys(["frame_id", "subject_id", "sha256", *columns]))
    rows = tables.rows(folder, "frames", wanted)
    result = []
    for subject_id, group in groupby(rows, key=lambda row: row["subject_id"]):
        frames = list(group)
        if extra is not None:
            frames = [{**row, "extra": extra[row["frame_id"]]} for row in frames if row["frame_id"] in extra]
        if frames:
            ids = tuple(row["frame_id"] for row in frames)
            result.append(shards.Item(subject_id, digest(frames), ids, frames))
    return result
