"""Work that a killed run does not lose: the rows of each finished subject are kept until the stage's table is whole.

What `pipelines.shards` is to many small photos on many workers, this is to a few long computations in one process.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from params import RunParams
from pipelines import tables
from stage import Progress, digest, exclusive

# As the parts of the data stages: few files, each still quick to read whole.
PART_BYTES = 64 * 2**20

Compute = Callable[[Any], list[dict[str, Any]]]


@dataclass(frozen=True)
class Task:
    """The rows of one subject.

    id: the subject's. inputs: JSON-like, all that the rows depend on beside the stage's identity. pictures: what the
    progress counts. payload: what the computation is given.
    """

    id: str
    inputs: Any
    pictures: int
    payload: Any


@dataclass
class Tally:
    """What a run did."""

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
    start: Callable[[], Compute],
    out: Path,
    run: RunParams,
) -> Tally:
    """Write `table` into `out`, computing only the subjects that no earlier run of the same identity has finished.

    Args:
        tasks: sorted by id part by part; drawn one at a time, so that payloads need not fit in memory together.
        total: pictures of all tasks.
        identity: JSON-like: params, code and weights that the rows depend on.
        start: loads the models; called only where something is missing.

    Raises:
        UserError: another run holds the stage.
    """
    started, tally, files = time.monotonic(), Tally(), []
    folder = Path(run.work) / stage / digest(identity)
    compute: Compute | None = None
    with exclusive(stage, Path(run.work)):
        progress = Progress(stage, total, "picture")
        try:
            for task in tasks:
                file = folder / f"{digest(task.id, task.inputs)}.parquet"
                if file.exists():
                    tally.done_before += 1
                else:
                    compute = compute or start()
                    tables.write_part(file, table, tables.from_rows(table, compute(task.payload)))
                    tally.computed += task.pictures
                files.append(file)
                tally.subjects += 1
                tally.pictures += task.pictures
                progress.advance(task.pictures)
        finally:
            progress.close()
        gather(out, table, files)
    tally.seconds = time.monotonic() - started
    return tally


def gather(out: Path, table: str, files: Sequence[Path]) -> None:
    """Write the subjects' files as one table in key order; in several parts where its first key is the subject."""
    temporary = out / f".{table}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    by_subject = tables.TABLES[table].keys[0] == "subject_id"
    for number, members in enumerate(_bins(files) if by_subject and files else [list(files)]):
        rows = [tables.read_part(file, table) for file in members] or [tables.from_rows(table, [])]
        tables.write_part(temporary / f"part-{number:05d}.parquet", table, tables.sort(table, pa.concat_tables(rows)))
    shutil.rmtree(out / table, ignore_errors=True)
    temporary.rename(out / table)


def _bins(files: Sequence[Path]) -> Iterator[list[Path]]:
    members: list[Path] = []
    size = 0
    for file in files:
        if members and size + file.stat().st_size > PART_BYTES:
            yield members
            members, size = [], 0
        members.append(file)
        size += file.stat().st_size
    if members:
        yield members
