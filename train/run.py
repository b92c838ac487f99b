"""One rank of a training run, started by `train.launch`, DeepSpeed's own launcher or torchrun."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from model.backbones.variant import Variant, load_variant
from params import BackbonesParams, RunParams, cli, data_dir, load
from pipelines import tables
from pipelines.storage import SourceParams
from stage import digest, digest_files, exclusive, write_json
from train import arrays
from train.arrays import Arrays
from train.checkpoint import Checkpoints
from train.data import TrainingSet
from train.log import Record
from train.ranks import Ranks, die_with_parent, launched, settings
from train.recipe import ModelParams, TrainParams, code_digest, input_digest, recipe
from train.resume import ResumeOptions, accept, run_folder, unfinished
from train.uncached import AugmentParams, Photos
from train.validation import hold_out

if TYPE_CHECKING:  # DeepSpeed asks the environment for its device when it is imported
    from train.trainer import Trainer


def train(ranks: Ranks, resume: ResumeOptions) -> None:
    """Read tables, train, write the adapter and its losses."""
    from train.trainer import build

    params, model, run = load("train", TrainParams), load("model", ModelParams), load("run", RunParams)
    variant = load_variant(load("backbones", BackbonesParams).variant)
    data, work = data_dir(), Path(run.work) / "train"
    data_hash = ranks.first("data", lambda: input_digest(data))
    cached = Path(ranks.first("arrays", lambda: str(arrays.write(data, work / "arrays" / data_hash))))
    found = Arrays.open(cached)
    augmentation, sources = load("encode", AugmentParams), load("sources", list[SourceParams])
    photos = open_photos(found, data, augmentation, variant, sources, ranks)
    if photos is not None:
        data_hash = digest(data_hash, digest_files(*tables.parts(data / "mask", "masks")), augmentation.model_dump())
    samples = TrainingSet.read(data, found, params.pairing, photos)
    trained_on, held_out = hold_out(samples, params.validation.subjects, params.batch)
    counts = {"triplets": len(trained_on), "triplets_held_out": len(samples) - len(trained_on)}
    ranks.say(
        f"train: {len(samples)} triplets, {samples.dropped} dropped because a frame is not encoded,"
        f" {counts['triplets_held_out']} held out for validation"
    )
    trainer = build(params, model, variant, trained_on, ranks, run.threads)
    config = trainer.adapter.config
    base = backbone(trainer.diffusion.name, trainer.diffusion.revision, config.image_encoder, variant)
    whole = recipe(params, model, data=data_hash, code=code_digest(), base=base, ranks=[ranks.world, ranks.device.type])
    folder = Path(ranks.first("folder", lambda: str(begin(work, whole, resume))))
    with trainer.batches:
        record = trainer.fit(Checkpoints(folder, ranks, resume.folder), folder, held_out)
    counts |= {"steps": params.steps, "triplets_dropped": samples.dropped}
    publish(trainer, data_dir() / "train", data_hash, whole, record, counts)


def backbone(model: str, revision: str, image_encoder: str, variant: Variant) -> dict[str, Any]:
    """What a recipe holds of the frozen models: which weights, and how `variant` has them used. The tables tell layers
    and resolution too, but there may be none."""
    return {
        "model": model,
        "revision": revision,
        "weights": variant.diffusion.weights,
        "image_encoder": image_encoder,
        "layers": list(variant.image_encoder.layers),
        "resolution": variant.resolution,
    }


def begin(work: Path, whole: dict[str, Any], resume: ResumeOptions) -> Path:
    """The folder of the run with recipe `whole`; says what it goes on from, or why it begins anew."""
    said = accept(resume.folder, whole, resume) if resume.folder is not None else ""
    folder = run_folder(work, whole)
    if said := said or ("" if any(folder.glob("step-*")) else unfinished(work, folder, whole)):
        print(said, flush=True)
    return folder


def publish(
    trainer: Trainer, out: Path, data_hash: str, whole: dict[str, Any], record: Record, counts: dict[str, int]
) -> None:
    """Write the outs, all or none: the adapter with its card, losses and metrics. Collective."""
    card = {"recipe": whole, "losses": record.metrics(), "commit": commit(), **counts}
    try:
        trainer.save(out / "adapter", data_hash, card)
        if trainer.ranks.rank == 0:
            record.write(out)
            write_json(out / "metrics.json", counts | record.metrics())
    except BaseException:
        if trainer.ranks.rank == 0:
            shutil.rmtree(out, ignore_errors=True)
        raise


def commit() -> str | None:
    """The commit that is checked out; None where this is no git repository."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def open_photos(
    found: Arrays,
    data: Path,
    augmentation: AugmentParams,
    variant: Variant,
    sources: list[SourceParams],
    ranks: Ranks,
) -> Photos | None:
    """The photos and encoders that stand in for tables without a row; None where all is cached."""
    missing = {"hidden states": found.hidden is None, "latents": found.latents is None}
    names = " and ".join(name for name, absent in missing.items() if absent)
    if not names:
        return None
    ranks.say(
        f"train: {names} are not cached, so each step reads photos and runs the frozen encoder; see section encode"
    )
    return Photos.open(
        data,
        augmentation,
        variant,
        sources,
        ranks.device,
        hidden=missing["hidden states"],
        latents=missing["latents"],
    )


def lock(ranks: Ranks, work: Path) -> contextlib.AbstractContextManager[None]:
    """The stage's lock on rank 0, where no train.launch holds it for its ranks."""
    return exclusive("train", work) if ranks.rank == 0 and not launched() else contextlib.nullcontext()


def main() -> None:
    """Train as one of the ranks that the environment numbers."""
    die_with_parent()
    resume, run = ResumeOptions.read(), load("run", RunParams)
    for name, value in settings(run.torch_device(), run.threads).items():
        os.environ.setdefault(name, value)
    ranks = Ranks.join(run.torch_device())
    try:
        with lock(ranks, Path(run.work)):
            train(ranks, resume)
        dist.destroy_process_group()
    except Exception as error:
        sys.exit(ranks.report(error))
    except KeyboardInterrupt:  # the launcher was interrupted too, and tells
        sys.exit(130)


if __name__ == "__main__":
    cli(main)
