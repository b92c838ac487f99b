"""How much the benchmark measures, with which params, and trainers to measure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from model.backbones.variant import Variant, load_variant
from pipelines.photos.roots import SourceParams
from runtime.params import Params
from train.batches import arrays
from train.batches.arrays import Arrays
from train.batches.training_set import TrainingSet
from train.batches.uncached import AugmentParams, Photos
from train.distributed.ranks import LOOPBACK, Ranks
from train.launch import environment, free_port
from train.recipe import ModelParams, TrainParams, input_digest

if TYPE_CHECKING:  # DeepSpeed asks the environment for its device when it is imported
    from train.trainer import Trainer


@dataclass(frozen=True)
class Setting:
    """What a part of the benchmark is given."""

    all: Params
    params: TrainParams
    """Those of params.yaml, one rank, no accumulation, so many steps as a turn has."""
    model: ModelParams
    variant: Variant
    repeats: int
    """The median counts."""
    work: Path
    """Folder for files."""
    ranks: Ranks

    @property
    def data(self) -> Path:
        """Folder of the tables."""
        return self.all.data

    def trainer(self, uncached: bool = False) -> Trainer:
        """A trainer before its first step; `uncached` reads photos and runs the frozen encoders."""
        from train.trainer import build

        found = Arrays.open(arrays.write(self.data, self.work / "arrays" / input_digest(self.data)))
        photos = None
        if uncached:
            found = replace(found, hidden=None, latents=None, masks=None)
            augment = self.all.section("encode", AugmentParams)
            sources = self.all.section("sources", list[SourceParams])
            photos = Photos.open(
                self.data, augment, self.variant, sources, self.ranks.device, hidden=True, latents=True
            )
        samples = TrainingSet.read(self.data, found, self.params.pairing, photos)
        return build(self.params, self.model, self.variant, samples, self.ranks, self.all.run.threads)


@contextmanager
def setting_of(params: Params, steps: int, repeats: int, work: Path) -> Iterator[Setting]:
    """The setting of a command line; this process is the one rank of its run."""
    import torch.distributed as dist

    run, train = params.run, params.section("train", TrainParams)
    kind = run.torch_device()
    os.environ.update(environment(kind, run.threads))
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    os.environ.update({"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())})
    try:
        yield Setting(
            all=params,
            params=train.model_copy(update={"ranks": 1, "accumulation": 1, "steps": steps}),
            model=params.section("model", ModelParams),
            variant=load_variant(params.variant),
            repeats=repeats,
            work=work,
            ranks=Ranks.join(kind),
        )
    finally:
        dist.destroy_process_group()
