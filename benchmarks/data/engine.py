"""Parts that measure the shard engine on real Ray: overhead per shard, and speed-up from a second worker."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.data import photos
from benchmarks.data.setting import DataSetting
from benchmarks.measure import Line
from pipelines import tables
from pipelines.curate.stage import CurateWorker, SubjectItem, unpack
from pipelines.engine import cluster, driver
from pipelines.engine.actors import Worker
from pipelines.engine.items import Item
from pipelines.engine.shards import Rows
from pipelines.sources import Subject
from runtime.params import RunParams

ITEMS = 4  # per shard of the engine part: enough to exercise row order


class IdleWorker:
    """Returns one row per item and does no work."""

    def compute(self, payloads: Sequence[str]) -> list[Rows]:
        return [{"rejects": [tables.reject(payload, "bench", "empty")]} for payload in payloads]


class TimedWorker:
    """A stage's worker, logging the start and end time of each item and its number of units."""

    def __init__(self, make: Callable[[], Worker], units: Callable[[Any], int], trace: Path) -> None:
        self.worker, self.units, self.trace = make(), units, trace

    def compute(self, payloads: Sequence[Any]) -> list[Rows]:
        results = []
        with (self.trace / str(os.getpid())).open("a") as stream:
            for payload in payloads:
                count = self.units(payload)
                began = time.monotonic()
                results += self.worker.compute([payload])
                print(began, time.monotonic(), count, file=stream)
        return results


def run(
    work: Path, settings: RunParams, worker: Callable[[], Worker], items: Any, mean: int, kept: str = "frames"
) -> driver.Summary:
    """Run a stage over `items` from scratch; `kept` is the table it writes."""
    shutil.rmtree(work, ignore_errors=True)
    alone = settings.model_copy(update={"work": str(work / "shards"), "device": "cpu"})
    with driver.sole_writer("bench", alone, work / "out"):
        return driver.run_stage(
            "bench",
            items,
            worker,
            identity="bench",
            kept=kept,
            others=[],
            out=work / "out",
            run=alone,
            shard_items=mean,
        )


def engine(setting: DataSetting) -> Iterator[Line]:
    """Overhead per shard in seconds: writing, fsync, rename, dispatch and merge."""
    work, count = setting.sizes.work / "engine", setting.sizes.shards
    one = setting.run.model_copy(update={"workers": 1})
    started = cluster.connect(one)
    try:
        costs = []
        for _ in range(setting.sizes.repeats):
            small, large = (run(work, one, IdleWorker, idle_items(n), ITEMS) for n in (ITEMS, count * ITEMS))
            costs.append((large.seconds - small.seconds) / (large.shards - small.shards))
    finally:
        leave(started)
    goal = 0.05  # 0.5 % of the ten seconds that a shard of curate takes
    yield Line("engine, seconds a shard", statistics.median(costs), goal, most=True, detail=f"{large.shards} shards")


def idle_items(count: int) -> Iterator[Item]:
    for number in range(count):
        name = f"bench/{number:07d}"
        yield Item(name, "", (f"{name}/0",), f"{name}/0")


def workers(setting: DataSetting) -> Iterator[Line]:
    """Photos/s of two workers over one, while all workers are busy."""
    source = photos.source(setting)
    items = subject_items(photos.subjects(source, setting.sizes.photos))
    worker = partial(CurateWorker, setting.curate, [source], "cpu")
    yield two_over_one("two workers over one", setting, worker, items, count_photos, "photo", "frames")


def two_over_one(
    name: str,
    setting: DataSetting,
    worker: Callable[[], Worker],
    items: Sequence[Item],
    units: Callable[[Any], int],
    unit: str,
    kept: str,
) -> Line:
    """Return the rate of two workers over that of one, while all workers are busy.

    Args:
        units: number of `unit`s in the payload of an item; picklable.
        kept: the table that the worker writes.
    """
    two = setting.run.model_copy(update={"workers": 2, "threads": 1})
    started = cluster.connect(two)
    try:
        turns: list[tuple[float, float]] = []
        for _ in range(setting.sizes.repeats):
            rates = []
            for count in (1, 2):
                trace = setting.sizes.work / "trace"
                shutil.rmtree(trace, ignore_errors=True)
                trace.mkdir(parents=True)
                timed = partial(TimedWorker, worker, units, trace)
                run(setting.sizes.work / "workers", two.model_copy(update={"workers": count}), timed, items, 1, kept)
                rates.append(busy_rate([file.read_text() for file in sorted(trace.iterdir())]))
            turns.append((rates[0], rates[1]))
    finally:
        leave(started)
    one, both = (statistics.median(column) for column in zip(*turns, strict=True))
    detail = f"{both:.0f} and {one:.0f} {unit}s/s, {os.cpu_count()} cores"
    return Line(name, statistics.median(b / a for a, b in turns), 1.7, detail=detail)


def count_photos(payload: Any) -> int:
    """Return the number of photos of a subject, as curate's items hold it."""
    return len(unpack(payload).photos)


def subject_items(some: Sequence[Subject]) -> list[Item]:
    """Return the curate stage's items of subjects."""
    return [SubjectItem.of("", s) for s in some]


def busy_rate(traces: Sequence[str]) -> float:
    """Return photos/s from the last worker's start to the first worker's end.

    Each line of a trace is a subject: start time, end time, number of photos.
    """
    spans = [[tuple(map(float, line.split())) for line in trace.splitlines()] for trace in traces]
    begin, end = max(trace[0][0] for trace in spans), min(trace[-1][1] for trace in spans)
    inside = 0.0
    for trace in spans:
        for began, ended, count in trace:
            inside += count * max(0.0, min(ended, end) - max(began, begin)) / max(ended - began, 1e-9)
    return inside / max(end - begin, 1e-9)


def leave(started: bool) -> None:
    """Shut down Ray if it was started here."""
    if started:
        import ray

        ray.shutdown()
