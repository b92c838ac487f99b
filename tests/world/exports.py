"""Small tables with their photos to export pairs from, and the engine without Ray.

`python -m tests.world.exports FOLDER FORMAT WORKERS` exports them on Ray, as the driver that a test kills.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipelines.engine.actors import Actor
from pipelines.engine.items import Spool
from pipelines.engine.shards import Index, Shard
from pipelines.engine.work import WorkFolder
from pipelines.export.command import export_pairs
from pipelines.export.formats import FORMATS
from pipelines.export.options import ExportOptions
from runtime.closure import ROOT
from runtime.params import Params
from tests.world.photos import blocks
from tests.world.shard_workers import on_cpus
from tests.world.tables import frame, mask, triplet, write

VIEWS = 4
SUBJECTS = ("s/cup/blue", "s/mug/red", "s/mug/ünder")
ANGLE = 37.5
SMALL = ExportOptions(size=32, part=3)
"""Eleven pairs of `write_tables`, in four shards."""


def write_tables(folder: Path, views: int = VIEWS, **columns: Any) -> Path:
    """Write photos of three subjects and the tables of their pairs below `folder`; return the folder of the tables.

    Each subject has a triplet for each view as target, and the last subject's last triplet is of one photo. `columns`
    are set in all frames.
    """
    data, frames, masks, triplets = folder / "data", [], [], []
    for number, subject in enumerate(SUBJECTS):
        for view in range(views):
            name = f"{subject}/{view}"
            (folder / "photos" / subject).mkdir(parents=True, exist_ok=True)
            blocks(10 * number + view, 96, 72).save(folder / "photos" / f"{name}.png")
            noun = subject.split("/")[1]
            own = {"class_name": noun, "caption": f"a {noun}, view {view}", "path": f"{name}.png", "sharpness": 12.5}
            frames.append(frame(name, **own | columns))
            pixels = np.zeros((72, 96), dtype=bool)
            pixels[10:60, 20 + 4 * view : 50 + 4 * view] = True
            masks.append(mask(name, pixels, score=0.5, phrase=noun))
            others = [f"{subject}/{(view + step) % views}" for step in (1, 2)]
            angle = ANGLE if noun == "mug" else None
            own = {"class_name": noun, "reference_target_angle": angle, "method": "pose" if angle else "order"}
            triplets.append(triplet(f"{subject}/{view:03d}", others[0], others[1], name, **own))
    triplets[-1] |= dict.fromkeys(("reference", "positive"), triplets[-1]["target"])
    write(data / "curate", "frames", frames)
    write(data / "mask", "masks", masks)
    write(data / "pairs", "triplets", triplets)
    return data


def params(folder: Path, **changes: Any) -> Params:
    """The repository's params for the tables of `write_tables`, with `changes` of the section `run`."""
    tree = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    tree["sources"] = [{"name": "s", "layout": "folder", "root": str(folder / "photos"), "split": "train"}]
    tree["run"] = on_cpus(folder / "work", **changes).model_dump()
    return Params(tree, folder / "data")


def compute_here(
    stage: str, missing: Sequence[Shard], work: WorkFolder, spool: Spool, index: Index, worker: Any, run: Any
) -> int:
    """What `actors.compute` does, in this process."""
    actor, total = Actor(worker, 1), 0
    for shard in missing:
        todo = [spool.read(key) for key in shard.keys if key not in index]
        actor.run(work, shard, todo, index.places(shard.keys), {})
        total += len(todo)
    return total


def main() -> None:
    folder, name, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    export_pairs(params(folder, workers=workers), FORMATS[name], SMALL, str(folder / "out"))


if __name__ == "__main__":
    main()
