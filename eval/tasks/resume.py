"""Resumable work: the rows of each finished task are kept on disk until the stage's table is complete.

The counterpart of `pipelines.engine.shards` for a few long computations on one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from eval.tasks.processes import deal_out
from pipelines import tables
from runtime.digest import digest
from runtime.lock import exclusive
from runtime.params import RunParams
from runtime.progress import Progress

Compute = Callable[[Any], list[dict[str, Any]]]
Start = Callable[[], Compute]


@dataclass(frozen=True)
class Task:
    """Rows that are computed together, usually those of one subject.

    id: unique within the stage. inputs: JSON-like, everything the rows depend on beyond the stage's identity.
    pictures: number of images, for the progress bar. payload: argument of the computation.
    """

    id: str
    inputs: Any
    pictures: int
    payload: Any


@dataclass
class Tally:
    """Counts of a run; `subjects` and `done_before` count tasks."""

    subjects: int = 0
    done_before: int = 0
    pictures: int = 0
    computed: int = 0
    seconds: float = 0.0


def run_tasks(
    stage: str,
    table: str,
    tasks: Iterable[Task],
    total: int,
    *,
    identity: Any,
    start: Start | Sequence[Start],
    out: Path,
    run: RunParams,
) -> Tally:
    """Write `table` into `out`, computing only the tasks that no earlier run of the same identity has finished.

    Args:
        tasks: in any order, each row in exactly one; consumed one at a time, so that all payloads need not fit in
            memory at once.
        total: images in all tasks.
        identity: JSON-like: params, code and weights that the rows depend on.
        start: loads the models; called only if a task is missing. With several, each runs in its own process; they and
            the payloads must be picklable.

    Raises:
        UserError: another run holds the stage's lock, or a process died.
    """
    started, tally, files = time.monotonic(), Tally(), []
    folder = Path(run.work) / stage / digest(identity)
    starts = [start] if callable(start) else list(start)
    with exclusive(stage, Path(run.work)):
        progress = Progress(stage, total, "image")

        def missing() -> Iterator[tuple[Path, Task]]:
            for task in tasks:
                file = folder / f"{digest(task.id, task.inputs)}.parquet"
                files.append(file)
                tally.subjects += 1
                tally.pictures += task.pictures
                if file.exists():
                    tally.done_before += 1
                    progress.advance(task.pictures)
                else:
                    yield file, task

        try:
            for task in compute(stage, table, starts, missing()):
                tally.computed += task.pictures
                progress.advance(task.pictures)
        finally:
            progress.close()
        tables.write_parts(out, table, by_subject(table, files))
    tally.seconds = time.monotonic() - started
    return tally


def compute(stage: str, table: str, starts: Sequence[Start], todo: Iterator[tuple[Path, Task]]) -> Iterator[Task]:
    """Yield each task when its file is written: in this process with one `starts`, else in one process each."""
    if len(starts) > 1:
        yield from deal_out(stage, [partial(Writer, table, start) for start in starts], todo, lambda task: task.payload)
        return
    write: Writer | None = None
    for file, task in todo:
        write = write or Writer(table, starts[0])
        write(file, task.payload)
        yield task


class Writer:
    """Writes the file of a task."""

    def __init__(self, table: str, start: Start) -> None:
        self.table, self.compute = table, start()

    def __call__(self, file: Path, payload: Any) -> None:
        tables.write_part(file, self.table, tables.from_rows(self.table, self.compute(payload)))


def by_subject(table: str, files: Sequence[Path]) -> Iterator[pa.Table]:
    """Yield the rows of the tasks' files in the table's order, one subject at a time to limit memory."""
    keys = tables.TABLES[table].keys
    first = keys[: keys.index("subject_id") + 1]
    places: dict[tuple[str, ...], list[Path]] = {}
    for file in files:
        for key in dict.fromkeys(_keys(tables.read_part(file, table, first), first)):
            places.setdefault(key, []).append(file)
    for key in sorted(places, key=lambda values: [tables.path_order(value) for value in values]):
        parts = [tables.read_part(file, table) for file in places[key]]
        rows = [part.filter(pa.array([other == key for other in _keys(part, first)])) for part in parts]
        yield tables.sort(table, pa.concat_tables(rows))


def _keys(part: pa.Table, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(part[name].to_pylist() for name in names), strict=True)
