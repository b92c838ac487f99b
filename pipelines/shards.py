"""The engine of the data stages: deterministic shards, skip what is done, atomic writes, Ray actors.

A stage hands over items (subjects) and a worker class; it gets back Parquet tables whose bytes depend on the inputs and
params alone, not on the number of workers, the order in which they finish, or how often the run was killed on the way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import ModelError
from params import RunParams, UserError
from pipelines import tables
from stage import Progress, digest, digest_files, exclusive, write_json

PART_BYTES = tables.PART_BYTES

Rows = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Item:
    """The unit of work: what a worker gets at once and what is never computed twice.

    Attributes:
        id: path-like; items are processed and stored in its order.
        fingerprint: changes when any input byte that the result depends on changes.
        frame_ids: the photos accounted for by this item.
        payload: what the worker needs, picklable.
    """

    id: str
    fingerprint: str
    frame_ids: tuple[str, ...]
    payload: Any


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


def cut(items: Sequence[Item], mean: int) -> list[list[Item]]:
    """Cut sorted items into shards of `mean` items on average, at most 4 x `mean`.

    A shard ends where the hash of an item's id says so, so that a new item changes one shard and leaves all others as
    they are (content-defined chunking, as backup programs do it).
    """
    shards: list[list[Item]] = [[]]
    for item in items:
        shards[-1].append(item)
        ends_here = int(digest(item.id), 16) % mean == 0
        if ends_here or len(shards[-1]) == 4 * mean:
            shards.append([])
    return [shard for shard in shards if shard]


def run_stage(
    stage: str,
    items: Sequence[Item],
    worker: Callable[[], Worker],
    *,
    identity: Any,
    kept: str,
    others: Sequence[str],
    out: Path,
    run: RunParams,
    shard_items: int,
) -> Summary:
    """Compute the tables of a stage into `out` and return what was done.

    Args:
        stage: name, as in rejects and in the work folder.
        items: in any order, ids unique.
        worker: makes a `Worker` inside an actor; picklable.
        identity: params, code and weights the rows depend on, JSON-like; another identity shares nothing.
        kept: the table with a row for each kept photo; `rejects` holds the others.
        others: further tables the worker returns rows for.
        out: folder of the stage's tables.
        run: workers, device, work folder.
        shard_items: items in a shard on average.

    Raises:
        UserError: another run holds the stage, or a worker cannot be kept alive.
    """
    started = time.monotonic()
    names = (kept, "rejects", *others)
    ordered = sorted(items, key=lambda item: tables.path_order(item.id))
    work = Path(run.work).resolve() / stage / digest(stage, identity)  # workers may have another working folder
    with exclusive(stage, Path(run.work)):
        shards = [_Shard(work, tuple(shard), names) for shard in cut(ordered, shard_items)]
        missing = [shard for shard in shards if not shard.done()]
        summary = Summary(shards=len(shards), shards_done_before=len(shards) - len(missing))
        if missing:
            summary.items_computed = _compute(stage, missing, _Index(work), worker, run)
        for name in names:
            _gather(out, name, [shard.folder / f"{name}.parquet" for shard in shards])
    reasons = [row["reason"] for row in tables.rows(out, "rejects", ["reason"])]
    summary.rejects = tables.count_by(reasons)
    summary.kept = sum(pq.read_metadata(part).num_rows for part in tables.parts(out, kept))
    summary.input = sum(len(item.frame_ids) for item in ordered)
    summary.seconds = time.monotonic() - started
    return summary


class _Shard:
    """A run of items and the folder its tables are in once they are complete."""

    def __init__(self, work: Path, items: tuple[Item, ...], names: tuple[str, ...]) -> None:
        self.items = items
        self.names = names
        self.folder = work / digest([(item.id, item.fingerprint) for item in items])

    def done(self) -> bool:
        return self.folder.is_dir()

    def save(self, results: Sequence[Rows]) -> None:
        """Write tables and row counts beside the final place, then rename: the folder exists only when complete."""
        temporary = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        counts = []
        for item, result in zip(self.items, results, strict=True):
            counts.append([item.id, item.fingerprint, [len(result.get(name, [])) for name in self.names]])
        for name in self.names:
            in_order = [tables.from_rows(name, result.get(name, [])) for result in results]
            tables.write_part(temporary / f"{name}.parquet", name, pa.concat_tables(in_order))
        with (temporary / "items.json").open("w") as stream:
            json.dump({"tables": self.names, "items": counts}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(OSError):  # another run may have finished the same shard: its bytes are the same
            temporary.rename(self.folder)
        shutil.rmtree(temporary, ignore_errors=True)


class _Index:
    """Rows of single items in the shards of earlier runs, so that a grown shard computes only what is new."""

    def __init__(self, work: Path) -> None:
        self.place: dict[tuple[str, str], tuple[Path, int]] = {}
        for file in sorted(work.glob("[!.]*/items.json")):  # a killed run leaves half-written .<shard>.<pid>.tmp
            for position, (item_id, fingerprint, _) in enumerate(json.loads(file.read_text())["items"]):
                self.place[item_id, fingerprint] = (file.parent, position)

    def rows(self, item: Item) -> Rows | None:
        """Return the rows of `item` where they are known."""
        if (item.id, item.fingerprint) not in self.place:
            return None
        folder, position = self.place[item.id, item.fingerprint]
        result: Rows = {}
        for name, (counts, table) in _load_shard(folder).items():
            result[name] = table.slice(sum(counts[:position]), counts[position]).to_pylist()
        return result


@lru_cache(maxsize=4)
def _load_shard(folder: Path) -> dict[str, tuple[list[int], pa.Table]]:
    """Return, for each table of a finished shard, how many rows each item has and the rows."""
    record = json.loads((folder / "items.json").read_text())
    return {
        name: ([entry[2][column] for entry in record["items"]], tables.read_part(folder / f"{name}.parquet", name))
        for column, name in enumerate(record["tables"])
    }


def _compute(stage: str, missing: Sequence[_Shard], index: _Index, worker: Callable[[], Worker], run: RunParams) -> int:
    """Compute the missing shards on Ray actors; return how many items were not known before."""
    known = {s.folder: {i.id: rows for i in s.items if (rows := index.rows(i)) is not None} for s in missing}
    todo = {s.folder: [i for i in s.items if i.id not in known[s.folder]] for s in missing}
    total = sum(map(len, todo.values()))
    device = run.torch_device()
    started = connect(run)
    import ray

    options = reservation(run, device)
    actors = min(run.workers, len(missing), room(ray.nodes(), options))
    if actors == 0:
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

    def survives(items: Sequence[Item]) -> bool:
        """Whether a fresh worker lives through these items; an exception is no death."""
        probe = start()
        try:
            ray.get(probe.compute.remote(items))
        except ray.exceptions.RayTaskError:
            pass
        except deaths:
            return False
        ray.kill(probe)
        return True

    queue = list(reversed(missing))
    poison: dict[Path, set[str]] = {}
    attempts: dict[Path, int] = {}
    pending: dict[Any, tuple[Any, _Shard]] = {}
    bar = Progress(stage, total, "item")

    def submit(actor: Any) -> None:
        shard = queue.pop()
        bad = poison.get(shard.folder, set())
        todo_now = [item for item in todo[shard.folder] if item.id not in bad]
        known_now = known[shard.folder] | {i.id: _crashed(stage, i) for i in shard.items if i.id in bad}
        pending[actor.run.remote(shard, todo_now, known_now)] = (actor, shard)

    try:
        for _ in range(actors):
            submit(start())
        while pending:
            (reference,), _ = ray.wait(list(pending), num_returns=1)
            actor, shard = pending.pop(reference)
            try:
                ray.get(reference)
                bar.advance(len(todo[shard.folder]))
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, (UserError, ModelError)) else error) from None
            except deaths as error:
                attempts[shard.folder] = attempts.get(shard.folder, 0) + 1
                if attempts[shard.folder] > run.restarts:
                    cause = " ".join(str(error).strip().splitlines()[-1].split())[:300]
                    raise UserError(
                        f"stage {stage}: a worker died {run.restarts + 1} times on one shard ({cause}); "
                        "give it more memory or lower run.workers"
                    ) from None
                if attempts[shard.folder] == 2:
                    poison[shard.folder] = {item.id for item in _find_poison(survives, todo[shard.folder])}
                queue.append(shard)
                actor = start()
            if queue:
                submit(actor)
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

    def run(self, shard: _Shard, todo: Sequence[Item], known: dict[str, Rows]) -> None:
        results = dict(known)
        if todo:
            results |= {item.id: rows for item, rows in zip(todo, self.compute(todo), strict=True)}
        shard.save([results[item.id] for item in shard.items])


def _find_poison(survives: Callable[[Sequence[Item]], bool], items: Sequence[Item]) -> list[Item]:
    """Return the items that kill their worker; none where it is the worker that dies, whatever it is given."""

    def halve(some: Sequence[Item]) -> list[Item]:
        if not some or survives(some):
            return []
        if len(some) == 1:
            return list(some)
        middle = len(some) // 2
        return halve(some[:middle]) + halve(some[middle:])

    if not survives([]):
        return []
    found = halve(items)
    return found if len(found) < max(len(items), 2) else []


def _crashed(stage: str, item: Item) -> Rows:
    return {"rejects": [tables.reject(frame_id, stage, "crashed") for frame_id in item.frame_ids]}


def connect(run: RunParams) -> bool:
    """Join the cluster named by RAY_ADDRESS, or start Ray on this machine, on loopback, telling nobody.

    Return whether Ray was started or joined here, and so is to be left here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not os.environ.get("RAY_ADDRESS"):
        # Ray's name for its loopback-only mode; without it, 127.0.0.1 below is replaced by the machine's address.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
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


def _gather(out: Path, name: str, files: Sequence[Path]) -> None:
    """Put the shards' files into `out/name` as few parts, in order; a large shard is linked, small ones are joined."""
    temporary = out / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    sizes = {file: file.stat().st_size for file in files}
    bins: list[list[Path]] = []
    for small, group in groupby(files, key=lambda file: sizes[file] < PART_BYTES):
        for file in group:
            full = not bins or not small or sum(sizes[f] for f in bins[-1]) + sizes[file] > PART_BYTES
            bins.append([file]) if full else bins[-1].append(file)
    for number, members in enumerate(bins):
        part = temporary / f"part-{number:05d}.parquet"
        if len(members) == 1:
            try:
                os.link(members[0], part)
            except OSError:  # another file system
                shutil.copyfile(members[0], part)
        else:
            joined = pa.concat_tables([tables.read_part(member, name) for member in members])
            tables.write_part(part, name, joined)
    if not bins:
        tables.write_part(temporary / "part-00000.parquet", name, tables.from_rows(name, []))
    shutil.rmtree(out / name, ignore_errors=True)
    temporary.rename(out / name)


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
