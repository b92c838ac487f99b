"""The engine of the data stages: deterministic shards, skipping finished work, atomic writes, Ray actors.

A stage passes in items (subjects) and a worker class and gets Parquet tables. Their bytes depend only on the inputs and
params, not on the number of workers, the order in which they finish, or how often the run was killed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import tables
from pipelines.engine import actors
from pipelines.engine.items import Item, Spool, cut
from pipelines.engine.shards import READERS, Index, Shard, bounded
from pipelines.engine.work import WorkFolder, is_url, room_on_disk
from pipelines.tables import files
from runtime.digest import digest
from runtime.files import write_metrics
from runtime.lock import exclusive
from runtime.params import RunParams


@dataclass
class Summary:
    """Outcome of a run; `input`, `kept` and `rejects` are the same for every run over the same data."""

    input: int = 0
    kept: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    shards: int = 0
    shards_done_before: int = 0
    items_computed: int = 0
    seconds: float = 0.0


def run_stage(
    stage: str,
    items: Iterable[Item],
    worker: Callable[[], actors.Worker],
    *,
    identity: Any,
    kept: str,
    others: Sequence[str],
    out: Path,
    run: RunParams,
    shard_items: int,
    shard_photos: int | None = None,
) -> Summary:
    """Compute the tables of a stage into `out` and return a summary. The caller holds `sole_writer`.

    Args:
        stage: name, used in rejects and in the work folder.
        items: in any order, ids unique; a generator is consumed item by item, so that millions of photos fit in memory.
        worker: constructs a `Worker` inside an actor; picklable.
        identity: params, code and weights the rows depend on, JSON-like; runs of different identity share no shards.
        kept: the table with one row per kept photo; `rejects` holds the others.
        others: further tables the worker returns rows for.
        out: folder of the stage's tables.
        run: workers, device, work folder.
        shard_items: mean number of items per shard.
        shard_photos: maximum number of photos in a shard of several items, for stages with large rows.

    Raises:
        UserError: a worker cannot be kept alive, or a disk is full.
    """
    started = time.monotonic()
    names = (kept, "rejects", *others)
    here = lock_folder(run, out)
    with room_on_disk(here):
        work = WorkFolder(run.work, stage, digest(stage, identity))
        work.sweep()
        spool = Spool(items, here)
        pieces = (piece for keys in cut(spool.keys, shard_items) for piece in bounded(keys, shard_photos))
        shards = [Shard(tuple(piece), names) for piece in pieces]
        done = work.sizes(names)
        missing = [shard for shard in shards if shard.name not in done]
        summary = Summary(shards=len(shards), shards_done_before=len(shards) - len(missing))
        if missing:
            index = Index(work, set(done) - {shard.name for shard in shards})
            summary.items_computed = actors.compute(stage, missing, work, spool, index, worker, run)
            done = work.sizes(names)
        with room_on_disk(out):
            for name in names:
                _gather(out, name, work, {shard.name: done[shard.name][f"{name}.parquet"] for shard in shards})
        settle(summary, out, kept)
    summary.input = sum(key.photos for key in spool.keys)
    summary.seconds = time.monotonic() - started
    return summary


def settle(summary: Summary, out: Path, kept: str) -> None:
    """Set `summary.kept` and `summary.rejects` (by reason) from the tables in `out`."""
    reasons = (reason for part in tables.stream(out, "rejects", ["reason"]) for reason in part["reason"].to_pylist())
    summary.rejects = tables.count_by(reasons)
    summary.kept = sum(pq.read_metadata(part).num_rows for part in tables.parts(out, kept))


@contextlib.contextmanager
def sole_writer(stage: str, run: RunParams, out: Path) -> Iterator[None]:
    """Hold the stage's lock: a second run would replace the tables while this one writes them.

    Raises:
        UserError: another run holds the lock, or a disk is full.
    """
    here = lock_folder(run, out)
    with room_on_disk(here), exclusive(stage, here), room_on_disk(out):
        yield


def lock_folder(run: RunParams, out: Path) -> Path:
    """Return the folder of a stage's lock: that of the tables if the work folder is a URL, which cannot be locked.

    Two machines that use one URL duplicate some work but do no harm: files of the same name have the same bytes.
    """
    return out if is_url(run.work) else Path(run.work)


def _gather(out: Path, name: str, work: WorkFolder, sizes: dict[str, int]) -> None:
    """Collect the shards' files in `out/name` as few parts: large shards are linked, small ones concatenated.

    Args:
        sizes: bytes of the table's file in each shard, in the order of the table.
    """
    bins: list[list[str]] = []
    held = 0
    for small, group in groupby(sizes, key=lambda shard: sizes[shard] < files.PART_BYTES):
        for shard in group:
            if not bins or not small or held + sizes[shard] > files.PART_BYTES:
                bins.append([])
                held = 0
            bins[-1].append(shard)
            held += sizes[shard]
    with tables.replacing(out, name) as part, ThreadPoolExecutor(READERS) as pool:
        for number, members in enumerate(bins):
            if len(members) == 1:
                work.fetch(members[0], name, part(number))
            else:
                joined = pa.concat_tables(list(pool.map(partial(work.table, name=name), members)))
                tables.write_part(part(number), name, joined)
        if not bins:
            tables.write_part(part(0), name, tables.from_rows(name, []))


def report(stage: str, summary: Summary, out: Path, extra: dict[str, Any] | None = None, unit: str = "photo") -> None:
    """Print the summary of a run and write its metrics; raise if a photo is unaccounted for.

    Args:
        extra: further metrics.
        unit: what the items account for.

    Raises:
        RuntimeError: kept + rejected is not the input; a bug in the stage, never a fault of the data.
    """
    rejected = sum(summary.rejects.values())
    if summary.kept + rejected != summary.input:
        raise RuntimeError(f"stage {stage} lost {unit}s: {summary.kept} kept + {rejected} rejected != {summary.input}")
    rate = summary.input / max(summary.seconds, 1e-9)
    print(
        f"{stage}: {summary.kept} of {summary.input} {unit}s kept, {rejected} rejected; {summary.shards} shards, "
        f"{summary.shards_done_before} done before; {summary.seconds:.1f} s, {rate:.0f} {unit}s/s"
    )
    for reason, count in summary.rejects.items():
        print(f"  {count:6d} {reason}: {tables.REJECT_REASONS[reason]}")
    counts = {"input": summary.input, "kept": summary.kept, "rejected": rejected}
    write_metrics(out, counts | {"reasons": summary.rejects} | (extra or {}), counts)
