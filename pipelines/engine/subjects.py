"""Subjects of the frames table as items of the stages after curate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pipelines import tables
from pipelines.engine.items import Item
from runtime.digest import digest

Extra = Mapping[str, Any] | Iterable[tuple[str, Any]]


def items(folder: Path, columns: Sequence[str], extra: Extra | None = None) -> Iterator[Item]:
    """Yield an item for each subject of the frames table in `folder`; its payload is the list of its frame rows.

    Streams subject by subject, so that memory does not grow with the table.

    Args:
        columns: of the frames table that the worker needs; frame_id, subject_id and sha256 are always included.
        extra: by frame_id, a further value added to the row as `extra`; frames without one are skipped. A mapping, or
            pairs (frame_id, value) in the order of the frames table, which are streamed.
    """
    find = None if extra is None else _finder(extra)
    wanted = list(dict.fromkeys(["frame_id", "subject_id", "sha256", *columns]))
    rows = tables.rows(folder, "frames", wanted)
    for subject_id, group in groupby(rows, key=lambda row: row["subject_id"]):
        frames = list(group)
        if find is not None:
            found = [(row, find(row["frame_id"])) for row in frames]
            frames = [{**row, "extra": value} for row, value in found if value is not None]
        if frames:
            ids = tuple(row["frame_id"] for row in frames)
            yield Item(subject_id, digest(frames), ids, frames)


def _finder(extra: Extra) -> Callable[[str], Any]:
    """Return a function from frame_id to its value or None; with pairs, frame_ids must be looked up in their order."""
    if isinstance(extra, Mapping):
        return extra.get
    pairs = iter(extra)
    ahead: list[tuple[str, Any]] = []

    def find(frame_id: str) -> Any:
        wanted = tables.path_order(frame_id)
        while True:
            if not ahead:
                following = next(pairs, None)
                if following is None:
                    return None
                ahead.append(following)
            order = tables.path_order(ahead[0][0])
            if order > wanted:
                return None
            pair = ahead.pop()
            if order == wanted:
                return pair[1]

    return find
