"""Sizes and params of the benchmark, and the trainers it measures."""

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

if TYPE_CHECKING:  # DeepSpeed reads its device from the environment on import
    from train.trainer import Trainer


@dataclass(frozen=True)
class TrainSetting:
    """Inputs of a part."""

    all: Params
    params: TrainParams
    """Those of params.yaml, with one rank, no accumulation and the steps of one turn."""
    model: ModelParams
    variant: Variant
    repeats: int
    """Of which the median counts."""
    work: Path
    """Working folder."""
    ranks: Ranks

    @property
    def data(self) -> Path:
        """Folder of the tables."""
        return self.all.data

    def ip_adapter_plus(self) -> TrainSetting:
        """The same for IP-Adapter-plus: its resampler, and L_diff alone."""
        objective = self.params.objective.model_copy(update={"cscl": False, "macl": False, "location_weight": 0.0})
        model = self.model.model_copy(update={"encoder": "ip_adapter_plus", "textual": False, "tv_fusion": False})
        return replace(self, model=model, params=self.params.model_copy(update={"objective": objective}))

    def trainer(self, uncached: bool = False) -> Trainer:
        """A new trainer; `uncached`: reads photos and runs the frozen encoders."""
        from train.trainer import build

        found = Arrays.open(arrays.write(self.data, self.work / "arrays" / input_digest(self.data)))
        photos = None
        if uncached:
            found = replace(found, hidden=None, latents=None, masks=None)
            augment = self.all.section("encode", AugmentParams)
            sources = self.all.section("sources", list[SourceParams])
            encoder, device = self.model.features(self.variant), self.ranks.device
            photos = Photos.open(self.data, augment, self.variant, encoder, sources, device, hidden=True, latents=True)
        samples = TrainingSet.read(self.data, found, self.params.pairing, photos)
        return build(self.params, self.model, self.variant, samples, self.ranks, self.all.run.threads)


@contextmanager
def setting_of(params: Params, steps: int, repeats: int, work: Path) -> Iterator[TrainSetting]:
    """The setting of a command line; this process is the only rank."""
    import torch.distributed as dist

    run, train = params.run, params.section("train", TrainParams)
    kind = run.torch_device()
    os.environ.update(environment(kind, run.threads))
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    os.environ.update({"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())})
    try:
        yield TrainSetting(
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
