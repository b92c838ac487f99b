"""Losses of twenty steps of the toybox's backbone, all digits: a change of the code that should change nothing shows.

They hold for one machine type and torch. `python -m tests.train.test_golden` records those of this machine.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import tables
from tests.train import tiny_world
from tests.train.processes import REPOSITORY, run_ranks

GOLDEN = Path(__file__).with_name("golden_losses.json")
MACHINE = f"torch {torch.__version__.split('+')[0]}, {torch.backends.cpu.get_cpu_capability()}"
# Of the toybox: latents, and hidden states of its CLIP at three layers.
SHAPES = {"CHANNELS": 4, "SIDE": 16, "LAYERS": 3, "TOKENS": 65, "WIDTH": 128}
NOUNS = ("mug", "box", "lamp", "chair")
PLACES = ("on the beach", "in the snow", "on a wooden table", "under water")
SETTINGS = (
    "model.width=128", "model.heads=4", "model.depth=4", "model.visual_tokens=16", "model.fourier_pairs=1024",
    "backbones.variant=toybox",
)  # fmt: skip


def losses(folder: Path) -> list[list[float]]:
    """Means of each step as they lie in the last checkpoint, unrounded."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHAPES.items():
            patch.setattr(tiny_world, name, value)
        patch.setattr(tiny_world, "NOUNS", NOUNS)
        data = tiny_world.write_world(folder / "data", views=8, single=2).data
    rows = tables.read(data / "curate", "frames").to_pylist()
    rng = np.random.default_rng(0)
    for row in rows:
        row["caption"] = f"a photo of a {row['class_name']} {PLACES[rng.integers(4)]}"
    tables.write(data / "curate", "frames", tables.from_rows("frames", rows))
    words = tiny_world.write_options(folder, Path("toybox"), data, steps=20, batch=4, ranks=1, checkpoint_every=20)
    for setting in SETTINGS:
        words += ["--set", setting]
    assert run_ranks(1, words, folder / "output") == [0], (folder / "output").read_text()
    (progress,) = folder.glob("work/train/*/step-000000020/progress.json")
    found: list[list[float]] = json.loads(progress.read_text())["state"]["rows"]
    return found


def test_twenty_steps_of_the_toybox_lose_what_they_lost(tmp_path: Path):
    golden = json.loads(GOLDEN.read_text())
    if MACHINE not in golden:
        pytest.skip(f"no golden losses for {MACHINE}; record them with python -m tests.train.test_golden")
    assert losses(tmp_path) == golden[MACHINE]


def record() -> None:
    """Write the losses of this machine into the file."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        golden[MACHINE] = losses(Path(folder))
    lines = [
        f"{json.dumps(machine)}: [\n" + ",\n".join(map(json.dumps, rows)) + "\n]"
        for machine, rows in sorted(golden.items())
    ]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{GOLDEN.relative_to(REPOSITORY)}: {MACHINE}", file=sys.stderr)


if __name__ == "__main__":
    record()
