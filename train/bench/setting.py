"""How much the benchmark measures, with which params, and trainers to measure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from model.backbones.variant import Variant, load_variant
from params import BackbonesParams, RunParams, data_dir, load
from pipelines.storage import SourceParams
from train import arrays
from train.arrays import Arrays
from train.data import TrainingSet
from train.launch import environment, free_port
from train.ranks import LOOPBACK, Ranks
from train.recipe import ModelParams, TrainParams, input_digest
from train.uncached import AugmentParams, Photos

if TYPE_CHECKING:  # DeepSpeed asks the environment for its device when it is imported
    from train.trainer import Trainer


@dataclass(frozen=True)
class Setting:
    """What a part of the benchmark is given."""

    params: TrainParams
    """Those of params.yaml, one rank, no accumulation, so many steps as a turn has."""
    model: ModelParams
    run: RunParams
    variant: Variant
    repeats: int
    """The median counts."""
    data: Path
    work: Path
    """Folder for files."""
    ranks: Ranks

    def trainer(self, uncached: bool = False) -> Trainer:
        """A trainer before its first step; `uncached` reads photos and runs the frozen encoders."""
        from train.trainer import build

        found = Arrays.open(arrays.write(self.data, self.work / "arrays" / input_digest(self.data)))
        photos = None
        if uncached:
            found = replace(found, hidden=None, latents=None, masks=None)
            augment, sources = load("encode", AugmentParams), load("sources", list[SourceParams])
            photos = Photos.open(
                self.data, augment, self.variant, sources, self.ranks.device, hidden=True, latents=True
            )
        samples = TrainingSet.read(self.data, found, self.params.pairing, photos)
        return build(self.params, self.model, self.variant, samples, self.ranks, self.run.threads)


@contextmanager
def setting_of(steps: int, repeats: int, work: Path) -> Iterator[Setting]:
    """The setting of this command line; this process is the one rank of its run."""
    import torch.distributed as dist

    run, params = load("run", RunParams), load("train", TrainParams)
    kind = run.torch_device()
    os.environ.update(environment(kind, run.threads))
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    os.environ.update({"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())})
    try:
        yield Setting(
            params=params.model_copy(update={"ranks": 1, "accumulation": 1, "steps": steps}),
            model=load("model", ModelParams),
            run=run,
            variant=load_variant(load("backbones", BackbonesParams).variant),
            repeats=repeats,
            data=data_dir(),
            work=work,
            ranks=Ranks.join(kind),
        )
    finally:
        dist.destroy_process_group()
