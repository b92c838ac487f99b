"""The Ray side of a stage: actors that compute shards, restarts, and the search for items that kill a worker."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pipelines import tables
from pipelines.engine import cluster
from pipelines.engine.items import Item, Spool
from pipelines.engine.shards import Index, Place, Rows, Shard, Stored, stored_rows
from pipelines.engine.work import WorkFolder
from runtime.errors import ModelError, UserError
from runtime.params import RunParams
from runtime.progress import Progress


class Worker(Protocol):
    """Computes the rows of items. Constructed once per actor, so that models load once."""

    def compute(self, payloads: Sequence[Any]) -> list[Rows]:
        """Return each payload's rows by table. Must not depend on how payloads are batched."""


def compute(
    stage: str,
    missing: Sequence[Shard],
    work: WorkFolder,
    spool: Spool,
    index: Index,
    worker: Callable[[], Worker],
    run: RunParams,
) -> int:
    """Compute the missing shards on Ray actors; return how many items had to be computed."""
    todo = {shard.name: [key for key in shard.keys if key not in index] for shard in missing}
    total = sum(map(len, todo.values()))
    device = run.torch_device()
    started = cluster.connect(run)
    import ray

    options = cluster.reservation(run, device)
    actors = min(run.workers, len(missing), cluster.room(ray.nodes(), options))
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
        alive.append(ray.remote(Actor).options(**options).remote(worker, run.threads))
        return alive[-1]

    def stop(actor: Any) -> None:
        alive.remove(actor)
        ray.kill(actor)

    def survives(items: Sequence[Item]) -> bool:
        """Whether a fresh worker survives these items; an exception does not count as a death."""
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
    suspects: list[Shard] = []  # two workers died on each of them
    poison: dict[str, set[str]] = {}  # item id -> its photos that kill a worker
    attempts: dict[str, int] = {}
    pending: dict[Any, tuple[Any, Shard]] = {}
    bar = Progress(stage, total, "item")

    def submit(actor: Any) -> None:
        shard = queue.pop()
        crashed: dict[str, Rows] = {}
        remaining = []
        for key in todo[shard.name]:
            item, bad = spool.read(key), poison.get(key.id, set())
            if bad:
                item = item.without(bad)
                removed = sorted(bad - set(item.frame_ids))
                crashed[key.id] = {"rejects": [tables.reject(frame, stage, "crashed") for frame in removed]}
            if item.frame_ids or not bad:
                remaining.append(item)
        reference = actor.run.remote(work, shard, remaining, index.places(shard.keys), crashed)
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
                stop(actor)  # makes room for an actor that is still unplaced, as after the loss of a node
            if suspects and not pending:  # only now: a probe would wait forever for resources another worker holds
                for shard in suspects:
                    poison |= find_poison(survives, [spool.read(key) for key in todo[shard.name]])
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


class Actor:
    """Runs in a Ray worker process: computes a shard and writes it."""

    def __init__(self, worker: Callable[[], Worker], threads: int) -> None:
        self.make_worker, self.threads = worker, threads
        self.worker: Worker | None = None

    def compute(self, items: Sequence[Item]) -> list[Rows]:
        if self.worker is None:  # not in __init__, where Ray would turn a missing weight file into a dead actor
            if torch := sys.modules.get("torch"):  # imported with the worker's module; curate runs without
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
        """Write a shard: items' computed rows, their rows in an earlier shard, or rejects of what kills a worker."""
        results: dict[str, Rows | Stored] = {**stored_rows(work, known), **crashed}
        if todo:
            for item, rows in zip(todo, self.compute(todo), strict=True):
                before = crashed.get(item.id, {})  # rejects of its removed photos
                results[item.id] = {name: [*before.get(name, []), *rows.get(name, [])] for name in {*before, *rows}}
        shard.save(work, [results[key.id] for key in shard.keys])


def find_poison(survives: Callable[[Sequence[Item]], bool], items: Sequence[Item]) -> dict[str, set[str]]:
    """Return {item id: photos that kill their worker}; empty if the worker dies whatever it is given.

    If no photo of an item is fatal on its own, all of them are returned.
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
