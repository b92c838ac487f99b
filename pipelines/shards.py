"""The engine of the data stages: deterministic shards, skip what is done, atomic writes, Ray actors.

A stage hands over items (subjects) and a worker class; it gets back Parquet tables whose bytes depend on the inputs and
params alone, not on the number of workers, the order in which they finish, or how often the run was killed on the way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import ModelError
from params import RunParams, UserError
from pipelines import tables
from pipelines.items import Item, Key, Spool, cut
from pipelines.work import RECORD, WorkFolder, is_url, room_on_disk
from stage import Progress, digest, digest_files, exclusive, write_json

# Small files of an object store are read side by side: each alone waits for the network most of the time.
READERS = 16

Rows = dict[str, list[dict[str, Any]]]
Stored = dict[str, pa.Table]  # an item's rows of each table, as a shard holds them


class Worker(Protocol):
    """Computes the rows of items. Made once in each actor, so that models load once."""

    def compute(self, payloads: Sequence[Any]) -> list[Rows]:
        """Return, for each payload, the rows of each table. Must not depend on which payloads come together."""


@dataclass
class Summary:
    """What a run did; `input`, `kept` and `rejects` are the same for every run over the same data."""

    input: int = 0
    kept: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    shards: int = 0
    shards_done_before: int = 0
    items_computed: int = 0
    seconds: float = 0.0


def digest_spec(spec: Any) -> str:
    """Return what identifies the weights of a `model.backbones` spec: their bytes, or hub id and revision."""
    if spec.local.exists():
        return digest(spec.model_dump(), digest_files(spec.local))
    return digest(spec.model_dump())


def run_stage(
    stage: str,
    items: Iterable[Item],
    worker: Callable[[], Worker],
    *,
    identity: Any,
    kept: str,
    others: Sequence[str],
    out: Path,
    run: RunParams,
    shard_items: int,
    shard_photos: int | None = None,
    locked: bool = False,
) -> Summary:
    """Compute the tables of a stage into `out` and return what was done.

    Args:
        stage: name, as in rejects and in the work folder.
        items: in any order, ids unique; a generator is taken item by item, so that millions of photos fit in memory.
        worker: makes a `Worker` inside an actor; picklable.
        identity: params, code and weights the rows depend on, JSON-like; another identity shares nothing.
        kept: the table with a row for each kept photo; `rejects` holds the others.
        others: further tables the worker returns rows for.
        out: folder of the stage's tables.
        run: workers, device, work folder.
        shard_items: items in a shard on average.
        shard_photos: most photos in a shard of several items, where a photo's rows are large.
        locked: the caller is the `sole_writer`, as it writes more than these tables.

    Raises:
        UserError: another run holds the stage, a worker cannot be kept alive, or a disk is full.
    """
    started = time.monotonic()
    names = (kept, "rejects", *others)
    here = lock_folder(run, out)
    with contextlib.nullcontext() if locked else sole_writer(stage, run, out), room_on_disk(here):
        work = WorkFolder(run.work, stage, digest(stage, identity))
        work.sweep()
        spool = Spool(items, here)
        pieces = (piece for keys in cut(spool.keys, shard_items) for piece in bounded(keys, shard_photos))
        shards = [Shard(tuple(piece), names) for piece in pieces]
        done = work.sizes(names)
        missing = [shard for shard in shards if shard.name not in done]
        summary = Summary(shards=len(shards), shards_done_before=len(shards) - len(missing))
        if missing:
            index = _Index(work, set(done) - {shard.name for shard in shards})
            summary.items_computed = _compute(stage, missing, work, spool, index, worker, run)
            done = work.sizes(names)
        with room_on_disk(out):
            for name in names:
                _gather(out, name, work, {shard.name: done[shard.name][f"{name}.parquet"] for shard in shards})
        settle(summary, out, kept)
    summary.input = sum(key.photos for key in spool.keys)
    summary.seconds = time.monotonic() - started
    return summary


def settle(summary: Summary, out: Path, kept: str) -> None:
    """Count what the tables in `out` hold: the `kept` rows, and the rejects by reason."""
    reasons = (reason for part in tables.stream(out, "rejects", ["reason"]) for reason in part["reason"].to_pylist())
    summary.rejects = tables.count_by(reasons)
    summary.kept = sum(pq.read_metadata(part).num_rows for part in tables.parts(out, kept))


@contextlib.contextmanager
def sole_writer(stage: str, run: RunParams, out: Path) -> Iterator[None]:
    """Be the one process that writes the stage's tables: a second run would replace them half-way through this one.

    Raises:
        UserError: another run holds the stage, or a disk is full.
    """
    here = lock_folder(run, out)
    with room_on_disk(here), exclusive(stage, here), room_on_disk(out):
        yield


def bounded(keys: Sequence[Key], photos: int | None) -> list[list[Key]]:
    """Cut a shard's items again where they have more than `photos` photos together; an item stays whole."""
    pieces: list[list[Key]] = [[]]
    held = 0
    for key in keys:
        if photos is not None and pieces[-1] and held + key.photos > photos:
            pieces.append([])
            held = 0
        pieces[-1].append(key)
        held += key.photos
    return pieces


def lock_folder(run: RunParams, out: Path) -> Path:
    """Return where a stage's lock lies: beside the tables where the work folder is a URL, which cannot be locked.

    Runs of two machines into one URL do some work twice, and no harm: what they write under one name is the same.
    """
    return out if is_url(run.work) else Path(run.work)


class Shard:
    """A run of items, named by their ids and fingerprints."""

    def __init__(self, keys: tuple[Key, ...], names: tuple[str, ...]) -> None:
        self.keys, self.names = keys, names
        self.name = digest([(key.id, key.fingerprint) for key in keys])

    def save(self, work: WorkFolder, results: Sequence[Rows | Stored]) -> None:
        """Write the tables and how many rows of each are whose; the shard exists only when all of it does."""
        counts = []
        for key, result in zip(self.keys, results, strict=True):
            counts.append([key.id, key.fingerprint, [len(result.get(name, [])) for name in self.names]])
        with work.writing(self.name) as folder:
            for name in self.names:
                in_order = [_as_table(name, result.get(name, [])) for result in results]
                tables.write_part(folder / f"{name}.parquet", name, pa.concat_tables(in_order))
            with (folder / RECORD).open("w", encoding="utf-8") as stream:
                json.dump({"tables": self.names, "items": counts}, stream)
                stream.flush()
                os.fsync(stream.fileno())


def _as_table(name: str, rows: pa.Table | Sequence[dict[str, Any]]) -> pa.Table:
    """Return an item's rows as a table; those that a shard held are sorted already."""
    return rows.cast(tables.spec(name).schema) if isinstance(rows, pa.Table) else tables.from_rows(name, rows)


class Place(NamedTuple):
    """Where the rows of an item lie."""

    shard: str
    position: int  # of the item in the shard


class _Index:
    """Where single items lie in the shards of earlier runs, so that a grown shard computes only what is new.

    The driver knows the places, and the worker reads the rows: those of one item may take gigabytes.
    """

    def __init__(self, work: WorkFolder, earlier: Iterable[str]) -> None:
        self.place: dict[tuple[str, str], Place] = {}
        names = sorted(earlier)
        with ThreadPoolExecutor(READERS) as pool:
            for name, record in zip(names, pool.map(work.record, names), strict=True):
                for position, (item_id, fingerprint, _) in enumerate(record["items"]):
                    self.place[item_id, fingerprint] = Place(name, position)

    def __contains__(self, key: Key) -> bool:
        return (key.id, key.fingerprint) in self.place

    def places(self, keys: Iterable[Key]) -> dict[str, Place]:
        """Return, by id, the places of those items that are known."""
        return {key.id: self.place[key.id, key.fingerprint] for key in keys if key in self}


def stored_rows(work: WorkFolder, places: Mapping[str, Place]) -> dict[str, Stored]:
    """Return the rows of items that lie in finished shards, by id. Each shard is read once."""
    found: dict[str, Stored] = {item_id: {} for item_id in places}
    for shard in sorted({place.shard for place in places.values()}):
        record = work.record(shard)
        for column, name in enumerate(record["tables"]):
            table = work.table(shard, name)
            counts = [entry[2][column] for entry in record["items"]]
            starts = [0, *accumulate(counts)]
            for item_id, (where, position) in places.items():
                if where == shard:
                    found[item_id][name] = table.slice(starts[position], counts[position])
    return found


def _compute(
    stage: str,
    missing: Sequence[Shard],
    work: WorkFolder,
    spool: Spool,
    index: _Index,
    worker: Callable[[], Worker],
    run: RunParams,
) -> int:
    """Compute the missing shards on Ray actors; return how many items were not known before."""
    todo = {shard.name: [key for key in shard.keys if key not in index] for shard in missing}
    total = sum(map(len, todo.values()))
    device = run.torch_device()
    started = connect(run)
    import ray

    options = reservation(run, device)
    actors = min(run.workers, len(missing), room(ray.nodes(), options))
    if actors == 0:
        if started:
            ray.shutdown()
        raise UserError(
            f"stage {stage}: no machine has {options['num_cpus']} CPUs and {options['num_gpus']} GPUs for a worker;"
            " lower run.threads, run.decoders or run.gpus_per_worker, or set run.device"
        )
    print(
        f"{stage}: {total} items in {len(missing)} shards, {actors} worker{'s' * (actors > 1)} on {device}", flush=True
    )

    deaths = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
    alive: list[Any] = []

    def start() -> Any:
        alive.append(ray.remote(_Actor).options(**options).remote(worker, run.threads))
        return alive[-1]

    def stop(actor: Any) -> None:
        alive.remove(actor)
        ray.kill(actor)

    def survives(items: Sequence[Item]) -> bool:
        """Whether a fresh worker lives through these items; an exception is no death."""
        probe = start()
        try:
            ray.get(probe.compute.remote(items))
        except ray.exceptions.RayTaskError:
            pass
        except deaths:
            return False
        stop(probe)
        return True

    queue = list(reversed(missing))
    suspects: list[Shard] = []  # on which two workers died
    poison: dict[str, set[str]] = {}  # by item, its photos that kill a worker
    attempts: dict[str, int] = {}
    pending: dict[Any, tuple[Any, Shard]] = {}
    bar = Progress(stage, total, "item")

    def submit(actor: Any) -> None:
        shard = queue.pop()
        crashed: dict[str, Rows] = {}
        todo_now = []
        for key in todo[shard.name]:
            item, bad = spool.read(key), poison.get(key.id, set())
            if bad:
                item = item.without(bad)
                gone = sorted(bad - set(item.frame_ids))
                crashed[key.id] = {"rejects": [tables.reject(frame, stage, "crashed") for frame in gone]}
            if item.frame_ids or not bad:
                todo_now.append(item)
        reference = actor.run.remote(work, shard, todo_now, index.places(shard.keys), crashed)
        pending[reference] = (actor, shard)

    try:
        for _ in range(actors):
            submit(start())
        while pending:
            (reference,), _ = ray.wait(list(pending), num_returns=1)
            actor, shard = pending.pop(reference)
            try:
                ray.get(reference)
                bar.advance(len(todo[shard.name]))
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, (UserError, ModelError)) else error) from None
            except deaths as error:
                attempts[shard.name] = attempts.get(shard.name, 0) + 1
                if attempts[shard.name] > run.restarts:
                    cause = " ".join(str(error).strip().splitlines()[-1].split())[:300]
                    raise UserError(
                        f"stage {stage}: a worker died {run.restarts + 1} times on one shard ({cause}); "
                        "give it more memory or lower run.workers"
                    ) from None
                (suspects if attempts[shard.name] == 2 else queue).append(shard)
                actor = start()
            if queue:
                submit(actor)
            else:
                stop(actor)  # a worker that found no room yet, as after the loss of a node, waits for its place
            if suspects and not pending:  # not before: a probe would wait for ever for a place that another worker has
                for shard in suspects:
                    poison |= _find_poison(survives, [spool.read(key) for key in todo[shard.name]])
                queue, suspects = suspects, []
                for _ in range(min(actors, len(queue))):
                    submit(start())
    finally:
        bar.close()
        for actor in alive:
            ray.kill(actor)
        if started:
            ray.shutdown()
    return total


def reservation(run: RunParams, device: str) -> dict[str, float]:
    """Return what an actor reserves: beside a GPU its CPU work is decoding, without one the model's."""
    return {
        "num_cpus": max(run.threads, run.decoders),
        "num_gpus": run.gpus_per_worker if device == "cuda" else 0,
    }


def room(nodes: Sequence[dict[str, Any]], options: dict[str, float]) -> int:
    """Return how many actors fit on the machines of `ray.nodes()`: one more would wait for ever, with its shard."""
    needs = {name: amount for name, amount in zip(("CPU", "GPU"), options.values(), strict=True) if amount}
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    return sum(min(int(m.get(name, 0) / need + 1e-6) for name, need in needs.items()) for m in machines)


class _Actor:
    """Runs in a Ray worker process: computes a shard and writes it."""

    def __init__(self, worker: Callable[[], Worker], threads: int) -> None:
        self.make_worker, self.threads = worker, threads
        self.worker: Worker | None = None

    def compute(self, items: Sequence[Item]) -> list[Rows]:
        if self.worker is None:  # not in __init__, where Ray would turn a missing weight file into a dead actor
            if torch := sys.modules.get("torch"):  # loaded with the worker's module; curate does without
                torch.set_num_threads(self.threads)
            self.worker = self.make_worker()
        return self.worker.compute([item.payload for item in items]) if items else []

    def run(
        self,
        work: WorkFolder,
        shard: Shard,
        todo: Sequence[Item],
        known: Mapping[str, Place],
        crashed: Mapping[str, Rows],
    ) -> None:
        """Write a shard: of each item computed rows, those of an earlier shard, or rejects of what kills a worker."""
        results: dict[str, Rows | Stored] = {**stored_rows(work, known), **crashed}
        if todo:
            for item, rows in zip(todo, self.compute(todo), strict=True):
                before = crashed.get(item.id, {})  # of its photos that are left out
                results[item.id] = {name: [*before.get(name, []), *rows.get(name, [])] for name in {*before, *rows}}
        shard.save(work, [results[key.id] for key in shard.keys])


def _find_poison(survives: Callable[[Sequence[Item]], bool], items: Sequence[Item]) -> dict[str, set[str]]:
    """Return, by item, the photos that kill their worker; none where it is the worker that dies, whatever it is given.

    Where none of an item's photos does so alone, all of them are at fault together.
    """

    def halve(some: Sequence[Item]) -> list[Item]:
        if not some or survives(some):
            return []
        if len(some) == 1:
            return list(some)
        middle = len(some) // 2
        return halve(some[:middle]) + halve(some[middle:])

    def photos(item: Item, some: Sequence[str]) -> set[str]:
        others = set(item.frame_ids).difference(some)
        if others and (not some or survives([item.without(others)])):
            return set()
        if len(some) == 1:
            return set(some)
        middle = len(some) // 2
        return photos(item, some[:middle]) | photos(item, some[middle:])

    if not survives([]):
        return {}
    found = halve(items)
    if len(found) == max(len(items), 2):
        return {}
    return {item.id: photos(item, item.frame_ids) or set(item.frame_ids) for item in found}


def connect(run: RunParams) -> bool:
    """Join the cluster named by RAY_ADDRESS, or start Ray on this machine, on loopback, telling nobody.

    Return whether Ray was started or joined here, and so is to be left here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not os.environ.get("RAY_ADDRESS"):
        # Ray's name for its loopback-only mode; without it, 127.0.0.1 below is replaced by the machine's address.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Ray would give its workers niceness 15, and beside any other work on the machine a stage would stand still.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Nobody reads the metrics of such a Ray, and the thread that exports them every ten seconds has ended a driver
        # of five minutes with a segmentation fault.
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
        os.environ.setdefault("RAY_enable_open_telemetry", "0")
    import ray

    if ray.is_initialized():
        return False
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return True
    ray.init(
        address="local",
        num_cpus=max(run.workers * max(run.threads, run.decoders), 1),
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=128 * 2**20,  # only items and paths travel through it
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    return True


def _gather(out: Path, name: str, work: WorkFolder, sizes: dict[str, int]) -> None:
    """Put the shards' files into `out/name` as few parts; a large shard is linked, small ones are joined.

    Args:
        sizes: bytes of the table's file in each shard, in the order of the table.
    """
    bins: list[list[str]] = []
    held = 0
    for small, group in groupby(sizes, key=lambda shard: sizes[shard] < tables.PART_BYTES):
        for shard in group:
            if not bins or not small or held + sizes[shard] > tables.PART_BYTES:
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


def report(stage: str, summary: Summary, out: Path, extra: dict[str, Any] | None = None) -> None:
    """Print what a run did and write its metrics; raise when a photo is unaccounted for.

    Raises:
        RuntimeError: kept + rejected is not the input; a fault of the stage, never of the data.
    """
    rejected = sum(summary.rejects.values())
    if summary.kept + rejected != summary.input:
        raise RuntimeError(f"stage {stage} lost photos: {summary.kept} kept + {rejected} rejected != {summary.input}")
    rate = summary.input / max(summary.seconds, 1e-9)
    print(
        f"{stage}: {summary.kept} of {summary.input} photos kept, {rejected} rejected; {summary.shards} shards, "
        f"{summary.shards_done_before} done before; {summary.seconds:.1f} s, {rate:.0f} photos/s"
    )
    for reason, count in summary.rejects.items():
        print(f"  {count:6d} {reason}: {tables.REJECT_REASONS[reason]}")
    values = {"input": summary.input, "kept": summary.kept, "rejected": rejected, "reasons": summary.rejects}
    write_json(out / "metrics.json", values | (extra or {}))
