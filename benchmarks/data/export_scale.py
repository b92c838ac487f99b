"""Part that measures the memory of export-pairs over the number of pairs, without photos.

`python -m benchmarks.data.export_scale FOLDER FEW MANY` is one measurement in its own process, whose peak memory is
reported; with `--write PAIRS` it writes the tables in a process of its own.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.data.export import triplet
from benchmarks.data.scale import frame, items
from benchmarks.data.setting import DataSetting
from benchmarks.measure import Line
from pipelines import tables
from pipelines.engine.items import Item
from pipelines.export.command import survey_of
from pipelines.export.options import ExportOptions
from runtime.cli import Parser
from runtime.timing import seconds

FEW = 10_000
"""Pairs that are counted first: what they take is that of libraries and of one chunk of rows."""
MEGABYTES = 64.0
RLE = b"PPYo1" * 40
"""Stands for a mask's run lengths, 200 bytes."""
MIB = 1024


def export_scale(setting: DataSetting) -> Iterator[Line]:
    """Pairs/s of the pass that counts an export, and what it adds to the peak memory of a pass over `FEW` pairs."""
    folder, many = setting.sizes.work / "export-scale", setting.sizes.pairs
    shutil.rmtree(folder, ignore_errors=True)
    for pairs in (FEW, many):
        _run(folder / str(pairs), "--write", str(pairs))
    found = json.loads(_run(folder, str(FEW), str(many)).splitlines()[-1])
    shutil.rmtree(folder)
    yield Line(f"export, pairs/s at {many}", many / found["seconds"], detail=f"{found['seconds']:.0f} s to count them")
    detail = f"{found['few']:.0f} MiB after {FEW} pairs, {found['many']:.0f} after {many}"
    yield Line(f"export, MiB added by {many}", found["many"] - found["few"], MEGABYTES, most=True, detail=detail)


def _run(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "benchmarks.data.export_scale", str(folder), *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def measure(folder: Path, few: int, many: int) -> dict[str, float]:
    """Count the exports of two folders of tables, the smaller first; seconds of the larger, peaks in MiB."""
    found: dict[str, float] = {}
    for name, pairs in (("few", few), ("many", many)):
        found["seconds"] = seconds(partial(survey_of, folder / str(pairs), ExportOptions(size=512)))
        found[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
    return found


def write(folder: Path, pairs: int) -> None:
    """Write frames, masks and triplets of synthetic subjects: each view is the target of a pair."""
    places = {"frames": folder / "curate", "masks": folder / "mask", "triplets": folder / "pairs"}
    for name, place in places.items():
        tables.write_parts(place, name, (rows_of(name, item) for item in items(pairs)))


def rows_of(name: str, item: Item) -> pa.Table:
    """Return a subject's rows of a table."""
    subject_id, count = item.payload
    ids = item.frame_ids
    if name == "frames":
        rows = [frame(subject_id, view, count) for view in range(count)]
    elif name == "masks":
        rows = [mask(frame_id) for frame_id in ids]
    else:
        rows = [triplet(subject_id, ids, place) for place in range(count)]
    return tables.from_rows(name, rows)


def mask(frame_id: str) -> dict[str, Any]:
    """Return a row of the masks table."""
    values: dict[str, Any] = {"frame_id": frame_id, "phrase": "ball", "method": "annotated", "quality": "ok"}
    values |= {"box": [0.0, 0.0, 1080.0, 1920.0], "height": 1920, "width": 1080, "rle": RLE, "score": 1.0}
    return values | {"mask_score": 1.0, "area": 0.3, "border_contact": 0.0}


if __name__ == "__main__":
    parser = Parser(prog="python -m benchmarks.data.export_scale")
    parser.add_argument("folder", type=Path)
    parser.add_argument("sizes", type=int, nargs="*", metavar="PAIRS")
    parser.add_argument("--write", type=int, metavar="PAIRS")
    options = parser.parse_args(sys.argv[1:])
    if options.write:
        write(options.folder, options.write)
    else:
        print(json.dumps(measure(options.folder, *options.sizes)))
