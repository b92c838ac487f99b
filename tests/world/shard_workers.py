"""A stage small enough to be killed and counted; Ray's worker processes import it by name.

`python -m tests.world.shard_workers FOLDER COUNT FATES [WORKERS [WORK]]` runs it as the driver that a test
kills or starves.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipelines import tables
from pipelines.curate.worker import CurateWorker
from pipelines.engine import driver
from pipelines.engine.items import Item
from pipelines.engine.shards import Rows
from runtime.cli import guarded
from runtime.errors import ModelError, UserError
from runtime.params import RunParams

SHARD_ITEMS = 4
FRAMES = 3


@dataclass(frozen=True)
class Payload:
    """What a worker gets: the subject, and what befalls the worker that computes it."""

    subject_id: str
    fate: str = ""  # die, die:<frame>, user_error, model_error, bug, full:<n>, or the path of a file to wait for
    seed: int = 0
    frames: tuple[int, ...] = tuple(range(FRAMES))


class SomeItem(Item):
    """A subject of which a worker can be given some frames."""

    def without(self, frame_ids: Collection[str]) -> Item:
        left = [index for index in range(FRAMES) if f"{self.id}/{index}" not in frame_ids]
        names = tuple(f"{self.id}/{index}" for index in left)
        return replace(self, frame_ids=names, payload=replace(self.payload, frames=tuple(left)))


class EmbeddingWorker:
    """Makes up embeddings, rejects one frame in five, and leaves a trace of every item it computes."""

    def __init__(self, trace: Path, dies_at_birth: bool = False) -> None:
        if dies_at_birth:
            os._exit(1)
        self.trace = trace

    def compute(self, payloads: Sequence[Payload]) -> list[Rows]:
        return [self.embed(payload) for payload in payloads]

    def embed(self, payload: Payload) -> Rows:
        with (self.trace / payload.subject_id.replace("/", "_")).open("ab") as stream:
            stream.write(b".")
        match payload.fate:
            case "":
                pass
            case "die":
                os._exit(1)
            case frame if frame.startswith("die:"):
                if int(frame.removeprefix("die:")) in payload.frames:
                    os._exit(1)
            case "user_error":
                raise UserError("photo 7 is upside down; turn it")
            case "model_error":
                raise ModelError("weights/nothing is missing; fetch it")
            case "bug":
                raise ZeroDivisionError("a fault of the stage")
            case full if full.startswith("full:"):
                fill_disk(self.trace, int(full.removeprefix("full:")))
            case gate:
                (self.trace.parent / f"{Path(gate).name}.{os.getpid()}.pid").touch()
                while not Path(gate).exists():
                    time.sleep(0.02)
        rows: Rows = {"embeddings": [], "rejects": [], "features": []}
        for index in payload.frames:
            frame_id = f"{payload.subject_id}/{index}"
            code = hashlib.sha256(f"{frame_id} {payload.seed}".encode()).digest()
            if code[0] % 5 == 0:
                rows["rejects"].append(tables.reject(frame_id, "count", "blurred", f"{code[0]}"))
                continue
            vector = [value / 256 for value in code[:8]]
            rows["embeddings"].append(
                {"frame_id": frame_id, "subject_id": payload.subject_id, "encoder": "sha256", "vector": vector}
            )
            for augmentation in range(2):
                sizes = {"layers": 1, "tokens": 1, "width": 8}
                rows["features"].append(
                    {"frame_id": frame_id, "augmentation": augmentation, "hidden": vector[augmentation:], **sizes}
                )
        return rows


def fill_disk(trace: Path, syncs: int) -> None:
    """Leave room for so many more files, unless `room` beside the trace says that there is enough."""
    sync, left = os.fsync, iter(range(syncs))

    def fsync(file: int) -> None:  # where a file system that allocates late says that it is full
        if next(left, None) is None and not (trace.parent / "room").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    os.fsync = fsync


class SegfaultWorker(CurateWorker):
    """The curate stage with a decoder that a photo of these bytes brings down."""

    POISON = b"GIF89a poison"

    def examine(self, subject: Any, photo: Any, *rest: Any) -> Any:
        if not photo.reject and self.roots[subject.source].read(photo.path) == self.POISON:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().examine(subject, photo, *rest)


def on_cpus(work: Path | str, workers: int = 1, **changes: Any) -> RunParams:
    """How a stage is run on CPUs, one for each worker."""
    settings = {
        "threads": 1,
        "decoders": 1,
        "device": "cpu",
        "gpus_per_worker": 0.0,
        "restarts": 3,
        "purpose": "research",
    }
    return RunParams(**settings | {"workers": workers, "work": str(work)} | changes)


def item(subject_id: str, fate: str = "", seed: int = 0) -> Item:
    """An item whose fingerprint tells the seed, but not its fate."""
    frame_ids = tuple(f"{subject_id}/{index}" for index in range(FRAMES))
    return SomeItem(subject_id, str(seed), frame_ids, Payload(subject_id, fate, seed))


def some_items(count: int, fates: dict[int, str] | None = None) -> list[Item]:
    """Items `set/00`, `set/01`, ..., some of them with a fate."""
    return [item(f"set/{number:02d}", (fates or {}).get(number, "")) for number in range(count)]


def run(
    items: Sequence[Item],
    run_params: RunParams,
    out: Path,
    trace: Path,
    identity: Any = "params",
    dies_at_birth: bool = False,
) -> driver.Summary:
    """Run the stage over `items`, as its one writer."""
    trace.mkdir(parents=True, exist_ok=True)
    with driver.sole_writer("count", run_params, out):
        return driver.run_stage(
            "count",
            items,
            partial(EmbeddingWorker, trace, dies_at_birth),
            identity=identity,
            kept="embeddings",
            others=["features"],
            out=out,
            run=run_params,
            shard_items=SHARD_ITEMS,
        )


def counts(trace: Path) -> dict[str, int]:
    """How often each item was computed."""
    return {file.name.replace("_", "/"): file.stat().st_size for file in trace.iterdir()}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` and its bytes."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def main() -> None:
    here, count, fates = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    workers = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    work = sys.argv[5] if len(sys.argv) > 5 else str(here / "work")
    items = some_items(count, {int(number): fate for number, fate in fates.items()})
    summary = run(items, on_cpus(work, workers), here / "out", here / "trace")
    driver.report("count", summary, here / "out")


if __name__ == "__main__":
    from tests.world import shard_workers  # under its own name: Ray unpickles the worker class by it

    guarded(shard_workers.main)
