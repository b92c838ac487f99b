"""Training sets and samplers over the tables of a tiny world."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from train.batches import arrays
from train.batches.arrays import Arrays
from train.batches.sampler import Sampler
from train.batches.training_set import TrainingSet
from train.recipe import DropParams, input_digest

NOTHING = DropParams(image=0, text=0, both=0)


def read(data: Path, pairing: str | Mapping[str, str] = "triplet") -> TrainingSet:
    """The training set of the tables under `data`, whose arrays are written there."""
    return TrainingSet.read(data, Arrays.open(arrays.write(data, data / "work" / input_digest(data))), pairing)


def sampler(samples: TrainingSet, **options: Any) -> Sampler:
    """A sampler of batches of six that drops no condition; keywords replace its options."""
    defaults: dict[str, Any] = {"batch": 6, "seed": 1, "drop": NOTHING, "timesteps": 1000, "independent": True}
    return Sampler(samples, **{**defaults, **options})


def names(samples: TrainingSet, rows: np.ndarray) -> list[str]:
    """Ids of the triplets in these rows."""
    return samples.triplet_ids.take(pa.array(rows)).to_pylist()
