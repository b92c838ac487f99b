"""Metadata without photos, at the scale of MVImgNet: frames, duplicates, triplets, the next stage's items, tiles.

`python -m benchmarks.data.scale ROWS FOLDER` is one measurement in its own process, whose peak memory is reported.
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.setting import DataSetting
from benchmarks.measure import Line
from pipelines import tables
from pipelines.curate import duplicates
from pipelines.curate.stage import CurateParams
from pipelines.engine import driver, subjects
from pipelines.engine.items import Item
from pipelines.engine.shards import Rows
from pipelines.pairs import triplets
from pipelines.similarity.stage import SimilarityParams
from pipelines.similarity.tiles import prototypes, tiles
from runtime.cli import Parser, read_params, shared_options
from runtime.params import Params
from runtime.timing import seconds

VIEWS = 29.5  # frames per subject, as in MVImgNet: 6.5 million of 220,000 subjects
WIDTH = 64  # of the synthetic embeddings; only the bookkeeping is measured
SHARD = 64  # subjects
GIGABYTES = 4.0


class ViewWorker:
    """Creates synthetic frames of subjects, viewed from a ring around them."""

    def compute(self, payloads: Sequence[tuple[str, int]]) -> list[Rows]:
        return [{"frames": [frame(subject, view, count) for view in range(count)]} for subject, count in payloads]


class VectorWorker:
    """Creates a synthetic embedding for each frame."""

    def compute(self, payloads: Sequence[list[dict[str, Any]]]) -> list[Rows]:
        return [{"embeddings": embeddings(rows)} for rows in payloads]


def frame(subject_id: str, view: int, count: int) -> dict[str, Any]:
    """Return a row of the frames table: a camera at distance 2, looking at the origin."""
    turn = 2 * np.pi * view / count
    rotation = np.array([[np.cos(turn), 0, -np.sin(turn)], [0, 1, 0], [np.sin(turn), 0, np.cos(turn)]])
    return {
        "frame_id": f"{subject_id}/{view:03d}",
        "subject_id": subject_id,
        "source": "bench",
        "class_name": "ball",
        "caption": "a photo of a ball",
        "caption_origin": "template",
        "noun_start": 13,
        "noun_end": 17,
        "split": "train",
        "role": None,
        "path": f"{subject_id}/images/{view:03d}.jpg",
        "mask_path": None,
        "mask_sha256": None,
        "box": None,
        "width": 1080,
        "height": 1920,
        "sha256": hashlib.sha256(f"{view}/{subject_id}".encode()).hexdigest(),
        "phash": hashlib.sha256(f"{subject_id}/{view}".encode()).digest(),
        "sharpness": 100.0,
        "rotation": rotation.reshape(-1).tolist(),
        "translation": [0.0, 0.0, 2.0],
        "focal": [1000.0, 1000.0],
        "centre": [540.0, 960.0],
        "object_centre": [0.0, 0.0, 0.0],
        "licence": "CC-BY-4.0",
        "attribution": "bench",
    }


def embeddings(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of the embeddings table for the frames of a subject."""
    random = np.random.default_rng(int(rows[0]["subject_id"].rsplit("/", 1)[1]))
    vectors = random.normal(0.5, 1.0, (len(rows), WIDTH))
    units = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    ids = [{name: row[name] for name in ("frame_id", "subject_id")} for row in rows]
    return [{**names, "encoder": "bench", "vector": unit} for names, unit in zip(ids, units, strict=True)]


def items(rows: int) -> Iterator[Item]:
    """Yield the subjects of `rows` frames lazily, as a source's reader does."""
    total = max(round(rows / VIEWS), 1)
    for number in range(total):
        count = rows // total + (number < rows % total)
        subject_id = f"bench/{number:07d}"
        yield Item(subject_id, "", tuple(f"{subject_id}/{view:03d}" for view in range(count)), (subject_id, count))


def scale(setting: DataSetting) -> Iterator[Line]:
    """Rows/s and peak memory of the driver, for each number of rows."""
    rates = []
    for rows in setting.sizes.rows:
        folder = setting.sizes.work / f"scale-{rows}"
        command = [sys.executable, "-m", "benchmarks.data.scale", str(rows), str(folder), *setting.words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        total = sum(found["seconds"].values())
        rates.append(rows / total)
        parts = ", ".join(f"{name} {value:.0f} s" for name, value in found["seconds"].items())
        detail = f"{found['subjects']} subjects, {found['triplets']} triplets, {found['tiles']} tiles, " + (
            f"{found['frame_bytes']:.0f} bytes/frame: {parts}"
        )
        yield Line(f"scale, rows/s at {rows}", rates[-1], detail=detail)
        peaks = ", ".join(f"{name} {value:.2f}" for name, value in found["gigabytes"].items())
        most = max(found["gigabytes"].values())
        yield Line(f"scale, driver GB at {rows}", most, GIGABYTES, most=True, detail=f"peak so far: {peaks}")
    if len(rates) > 1:
        first, last = setting.sizes.rows[0], setting.sizes.rows[-1]
        yield Line("scale, rate at most over at least", rates[-1] / rates[0], 0.8, detail=f"{first} and {last} rows")


def measure(rows: int, folder: Path, params: Params) -> dict[str, Any]:
    """Run the bookkeeping of curate and similarity over `rows` synthetic frames."""
    shutil.rmtree(folder, ignore_errors=True)
    run = params.run.model_copy(update={"work": str(folder / "work"), "device": "cpu"})
    curating, tiling = params.section("curate", CurateParams), params.section("similarity", SimilarityParams)
    common: dict[str, Any] = {"identity": "bench", "run": run, "shard_items": SHARD}
    made: dict[str, float] = {}
    curate, similar = folder / "curate", folder / "similarity"

    def frames() -> None:
        driver.run_stage("frames", items(rows), ViewWorker, kept="frames", others=[], out=curate, **common)

    def embed() -> None:
        again = subjects.items(curate, ["source", "path"])
        driver.run_stage("embed", again, VectorWorker, kept="embeddings", others=[], out=similar, **common)

    def tile() -> None:
        ids, vectors = prototypes(similar)
        tables.write_parts(similar, "similarity", tiles(ids, vectors, tiling))

    def repeats() -> None:
        duplicates.drop(curate, curating.filters.duplicate_bits, 1, {})

    def choose() -> None:
        triplets.write(
            lambda: tables.stream(curate, "frames", triplets.COLUMNS),
            curate,
            params.section("pairs", triplets.TripletParams),
        )

    peaks: dict[str, float] = {}
    parts = {"frames": frames, "duplicates": repeats, "triplets": choose, "items": embed, "tiles": tile}
    for name, part in parts.items():
        made[name] = seconds(part)
        peaks[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    values = {
        "subjects": max(round(rows / VIEWS), 1),
        "triplets": tables.count(curate, "triplets"),
        "tiles": tables.count(similar, "similarity"),
        "seconds": made,
        "frame_bytes": sum(part.stat().st_size for part in tables.parts(curate, "frames")) / rows,
        "gigabytes": peaks,
    }
    shutil.rmtree(folder)
    return values


if __name__ == "__main__":
    from benchmarks.data import scale as this  # by its module name, under which Ray unpickles the worker classes

    parser = Parser(prog="python -m benchmarks.data.scale")
    parser.add_argument("rows", type=int)
    parser.add_argument("folder", type=Path)
    shared_options(parser)
    options = parser.parse_args(sys.argv[1:])
    print(json.dumps(this.measure(options.rows, options.folder, read_params(options))))
