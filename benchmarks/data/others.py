"""The same filters and hash on the same files with common alternatives: a table of photos/s."""

from __future__ import annotations

import hashlib
import importlib.util
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.data import engine, photos
from benchmarks.data.setting import DataSetting
from benchmarks.measure import Line
from pipelines.curate import filters
from pipelines.curate.stage import CurateParams, CurateWorker
from pipelines.engine import cluster
from pipelines.photos.decode import DecodeError
from runtime.timing import seconds

SHARD = 64  # files per shard, where shards are written
THREADS = 4  # reading ahead of a decoding process


def others(setting: DataSetting) -> Iterator[Line]:
    """Photos/s of this repository and of alternatives; Ray is already running, starting other pools is timed."""
    source = photos.source(setting)
    chosen = photos.subjects(source, setting.sizes.photos)
    files = [str(Path(source.root) / photo.path) for subject in chosen for photo in subject.photos]
    two = setting.run.model_copy(update={"workers": 2, "threads": 1})
    items = engine.subject_items(chosen)
    worker = partial(CurateWorker, setting.curate, [source], "cpu")
    started = cluster.connect(two)
    ways: dict[str, Callable[[Path], Any]] = {
        "this repository, 2 workers": lambda out: engine.run(out, two, worker, items, setting.curate.shard_subjects),
        "plain loop, 1 process": partial(plain_loop, files, setting.curate),
        "img2dataset's loop, 2 processes": partial(shard_pool, files, setting.curate),
    }
    if importlib.util.find_spec("pandas"):
        ways["Ray Data map_batches, 2 tasks"] = partial(ray_data, files, setting.curate)
    else:
        print("others: skipping Ray Data, which needs pandas (install the extra bench)")
    if importlib.util.find_spec("imagededup"):
        ways["imagededup, 2 processes, hash only"] = lambda _: imagededup(source.root)
    else:
        print("others: skipping imagededup, which is not installed (install the extra bench)")
    try:
        for name, way in ways.items():
            times = []
            for _ in range(setting.sizes.repeats):
                with tempfile.TemporaryDirectory(dir=setting.sizes.work) as out:
                    times.append(seconds(partial(way, Path(out))))
            yield Line(f"photos/s: {name}", len(files) / statistics.median(times), detail=f"{len(files)} photos")
    finally:
        engine.leave(started)


def examine(data: bytes, params: CurateParams) -> dict[str, Any]:
    """Return the curate stage's results for one photo as a plain row without a schema."""
    row: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest(), "reason": "", "phash": b"", "sharpness": 0.0}
    try:
        photo = filters.candidate(data, params.max_pixels, params.filters)
    except DecodeError as error:
        return row | {"reason": error.reason}
    reason = filters.first_reason(photo, filters.OF_PIXELS, params.filters)
    return row | {"reason": reason[0] if reason else "", "phash": photo.phash, "sharpness": photo.sharpness}


def plain_loop(files: Sequence[str], params: CurateParams, out: Path) -> None:
    """A for loop that writes one file at the end."""
    rows = [{"path": file, **examine(Path(file).read_bytes(), params)} for file in files]
    write(rows, out / "photos.parquet")


def shard_pool(files: Sequence[str], params: CurateParams, out: Path) -> None:
    """img2dataset's scheme: a pool of processes, each takes a shard, reads it with threads and writes a file."""
    shares = [(number, files[start : start + SHARD]) for number, start in enumerate(range(0, len(files), SHARD))]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for _ in pool.imap_unordered(partial(one_shard, params, out), shares):
            pass


def one_shard(params: CurateParams, out: Path, share: tuple[int, Sequence[str]]) -> None:
    number, files = share
    with ThreadPoolExecutor(THREADS) as pool:
        data = pool.map(lambda file: Path(file).read_bytes(), files)
        rows = [{"path": file, **examine(bytes_, params)} for file, bytes_ in zip(files, data, strict=True)]
    write(rows, out / f"{number:05d}.parquet")


def write(rows: list[dict[str, Any]], file: Path) -> None:
    table = pa.Table.from_pylist(rows, schema=pa.schema({name: kind(value) for name, value in rows[0].items()}))
    pq.write_table(table, file, compression="zstd")


def kind(value: Any) -> pa.DataType:
    return {str: pa.string(), bytes: pa.binary(), float: pa.float32()}[type(value)]


def ray_data(files: Sequence[str], params: CurateParams, out: Path) -> None:
    """A Ray Data pipeline: read, map_batches, write_parquet."""
    import ray

    batches = ray.data.read_binary_files(
        list(files), include_paths=True, override_num_blocks=max(len(files) // SHARD, 2)
    )
    rows = batches.map_batches(partial(examine_batch, params), batch_size=16, concurrency=2)
    rows.write_parquet(str(out / "photos"))


def examine_batch(params: CurateParams, batch: dict[str, Any]) -> dict[str, list[Any]]:
    rows = [{"path": path, **examine(data, params)} for path, data in zip(batch["path"], batch["bytes"], strict=True)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def imagededup(root: str) -> None:
    """imagededup's hashes and duplicates; without filters, so less work."""
    from imagededup.methods import PHash

    finder = PHash(verbose=False)
    finder.find_duplicates(encoding_map=finder.encode_images(root, recursive=True, num_enc_workers=2))
