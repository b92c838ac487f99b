"""One rank of a training run, started by `train.launch` or by DeepSpeed's own launcher."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from model.backbones.variant import load_variant
from params import BackbonesParams, RunParams, cli, data_dir, load
from stage import write_json
from train import arrays
from train.arrays import Arrays
from train.checkpoint import Checkpoints
from train.data import TrainingSet
from train.ranks import Ranks, die_with_parent
from train.recipe import ModelParams, TrainParams, code_digest, input_digest, run_digest


def train(ranks: Ranks) -> None:
    """Read tables, train, write the adapter and its losses."""
    from train.trainer import build

    params, model, run = load("train", TrainParams), load("model", ModelParams), load("run", RunParams)
    variant = load_variant(load("backbones", BackbonesParams).variant)
    data, work, out = data_dir(), Path(run.work) / "train", data_dir() / "train"
    data_hash = ranks.first("data", lambda: input_digest(data))
    cached = Path(ranks.first("arrays", lambda: str(arrays.write(data, work / "arrays" / data_hash))))
    samples = TrainingSet.read(data, Arrays.open(cached), params.pairing)
    ranks.say(f"train: {len(samples)} triplets, {samples.dropped} dropped because a frame is not encoded")
    trainer = build(params, model, variant, samples, ranks, run.threads)
    identity = run_digest(
        params,
        model,
        data=data_hash,
        code=code_digest(),
        base=[trainer.diffusion.name, trainer.diffusion.revision, trainer.engine.module.config.image_encoder],
        ranks=[ranks.world, ranks.device.type],
    )
    folder = work / identity
    folder.mkdir(parents=True, exist_ok=True)
    log = trainer.fit(Checkpoints(folder, ranks), folder / "log.jsonl")
    trainer.save(out / "adapter", data_hash)
    if ranks.rank == 0:
        log.write(out / "losses.csv")
        counts = {"steps": params.steps, "triplets": len(samples), "triplets_dropped": samples.dropped}
        write_json(out / "metrics.json", counts | log.final())


def main() -> None:
    """Train as one of the ranks that the environment numbers."""
    die_with_parent()
    ranks = Ranks.join(load("run", RunParams).torch_device())
    try:
        train(ranks)
        dist.destroy_process_group()
    except Exception as error:
        sys.exit(ranks.report(error))
    except KeyboardInterrupt:  # the launcher was interrupted too, and tells
        sys.exit(130)


if __name__ == "__main__":
    cli(main)
