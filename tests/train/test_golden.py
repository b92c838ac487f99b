"""Losses of twenty steps of a tiny model with random weights: a change of the code that should change nothing shows.

Nothing of the record depends on a trained weight or a type of processor: the weights are drawn in the test, and what
processors round differently stays far below the tolerance. `python -m tests.train.test_golden` records the losses anew.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.world.ranks import REPOSITORY, run_ranks
from tests.world.training import write_options, write_variant, write_world

GOLDEN = Path(__file__).with_name("golden_losses.json")
# Twenty steps of Adam with AVX2, with AVX-512 and without vector instructions (ATEN_CPU_CAPABILITY) agree to 1e-6;
# another noise, sample or initial weight changes the losses of the first step by more than 1e-3.
TOLERANCE = 2e-5


def losses(folder: Path) -> list[list[float]]:
    """Means of each step as they lie in the last checkpoint, unrounded."""
    data = write_world(folder / "data").data
    words = write_options(folder, write_variant(folder / "tiny"), data, steps=20, ranks=1, checkpoint_every=20)
    assert run_ranks(1, words, folder / "output") == [0], (folder / "output").read_text()
    (progress,) = folder.glob("work/train/*/step-000000020/progress.json")
    found: list[list[float]] = json.loads(progress.read_text())["state"]["rows"]
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_twenty_steps_lose_what_they_lost(tmp_path: Path):
    golden = json.loads(GOLDEN.read_text())
    # A column is null where no sample of the step fell into it.
    found, expected = (np.array(rows, dtype=float) for rows in (losses(tmp_path), golden))
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def record() -> None:
    """Write the losses into the file."""
    with tempfile.TemporaryDirectory() as folder:
        rows = losses(Path(folder))
    GOLDEN.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(GOLDEN.relative_to(REPOSITORY), file=sys.stderr)


if __name__ == "__main__":
    record()
