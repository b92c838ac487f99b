"""One rank of a training run, started by `train.launch`, DeepSpeed's own launcher or torchrun."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from model.backbones.diffusion import load_tokenizers
from model.backbones.features.source import FeatureSource
from model.backbones.variant import Variant, load_variant
from pipelines import tables
from pipelines.photos import licences
from pipelines.photos.roots import SourceParams
from runtime.cli import Parser, guarded, read_params, stage_parser
from runtime.digest import digest, digest_files
from runtime.files import write_metrics
from runtime.lock import exclusive
from runtime.params import Params
from train import STAGE
from train.batches import arrays
from train.batches.arrays import Arrays
from train.batches.training_set import TrainingSet, require_room
from train.batches.uncached import AugmentParams, Photos
from train.batches.validation import hold_out
from train.distributed.checkpoint import Checkpoints
from train.distributed.ranks import Ranks, die_with_parent, launched, settings
from train.distributed.resume import ResumeOptions, accept, run_folder, unfinished
from train.logs.log import Record
from train.recipe import ModelParams, TrainParams, input_digest, recipe, run_code

if TYPE_CHECKING:  # DeepSpeed reads its device from the environment on import
    from train.trainer import Trainer


def train(ranks: Ranks, params: Params, resume: ResumeOptions) -> None:
    """Read tables, train, write the adapter and its losses."""
    from train.trainer import build

    how, model, run = params.section("train", TrainParams), params.section("model", ModelParams), params.run
    variant = load_variant(params.variant)
    data, work = params.data, Path(run.work) / "train"
    data_hash = ranks.first("data", lambda: input_digest(data))
    cached = Path(ranks.first("arrays", lambda: str(arrays.write(data, work / "arrays" / data_hash))))
    found = Arrays.open(cached)
    augmentation = params.section("encode", AugmentParams)
    sources = params.section("sources", list[SourceParams])
    source = model.features(variant)
    photos = open_photos(found, data, augmentation, variant, source, sources, ranks)
    if photos is not None:
        data_hash = digest(data_hash, digest_files(*tables.parts(data / "mask", "masks")), augmentation.model_dump())
    samples = TrainingSet.read(data, found, how.pairing, photos)
    moved = 0
    if model.textual:
        samples, moved = samples.with_nouns_first(load_tokenizers(variant.diffusion), model.text_tokens, model.place)
    if how.curriculum.schedule != "none" and found.hidden is not None:
        ranks.say(
            "train: cached hidden states have one size of the subject, so train.curriculum only varies the pairs; leave"
            " them uncached (encode.inputs: []) to vary sizes too"
        )
    trained_on, held_out = hold_out(samples, how.validation.subjects, how.batch)
    counts = {"triplets": len(trained_on), "triplets_held_out": len(samples) - len(trained_on)}
    ranks.say(f"train: {len(samples)} triplets, {counts['triplets_held_out']} of them held out for validation")
    if moved:
        counts["captions_with_noun_first"] = moved
        ranks.say(f"train: {moved} captions have their class noun beyond the text encoder's tokens; put first")
    shown = licences.of_frames(data, triplets=True)
    if warning := licences.warning(licences.by_licence(shown), run.purpose):
        ranks.say(f"train: {warning}")
    trainer = build(how, model, variant, trained_on, ranks, run.threads)
    config = trainer.adapter.config
    advice = "shorten the class noun, its folder's name or entry in the annotations, and run curate again"
    require_room(trainer.diffusion, config, samples.captions.to_pylist(), samples.class_names.to_pylist(), advice)
    base = backbone(trainer.diffusion.name, trainer.diffusion.revision, source, variant)
    if model.words.names is not None:
        base["names"] = digest(model.words.read_names())
    whole = recipe(how, model, data=data_hash, code=run_code(), base=base, ranks=[ranks.world, ranks.device.type])
    folder = Path(ranks.first("folder", lambda: str(begin(work, whole, resume))))
    with trainer.batches:
        record = trainer.fit(Checkpoints(folder, ranks, resume.folder), folder, held_out)
    counts |= {"steps": how.steps}
    publish(trainer, data / "train", data_hash, whole, record, counts, shown)


def backbone(model: str, revision: str, source: FeatureSource, variant: Variant) -> dict[str, Any]:
    """The frozen models' entry in a recipe: which weights, and how they are used. The tables imply layers and
    resolution too, but may be absent."""
    return {
        "model": model,
        "revision": revision,
        "weights": variant.diffusion.weights,
        "image_encoder": source.name,
        "layers": list(source.layers),
        "resolution": variant.resolution,
    }


def begin(work: Path, whole: dict[str, Any], resume: ResumeOptions) -> Path:
    """The folder of the run with recipe `whole`; prints what it resumes, or why it is a new run."""
    notice = accept(resume.folder, whole, resume) if resume.folder is not None else ""
    folder = run_folder(work, whole)
    if notice := notice or ("" if any(folder.glob("step-*")) else unfinished(work, folder, whole)):
        print(notice, flush=True)
    return folder


def publish(
    trainer: Trainer,
    out: Path,
    data_hash: str,
    whole: dict[str, Any],
    record: Record,
    counts: dict[str, int],
    shown: list[licences.LicensedPhotos],
) -> None:
    """Write the outputs, all or none: the adapter with its card, losses and metrics. Collective.

    Args:
        shown: the photos of the triplets, by source and licence.
    """
    photos = [of.plain() for of in shown]
    card = {"recipe": whole, "losses": record.metrics(), "commit": commit(), "photos": photos, **counts}
    try:
        trainer.save(out / "adapter", data_hash, card)
        if trainer.ranks.rank == 0:
            record.write(out)
            values = counts | record.metrics()
            held_out = values.get("validation") or {}
            write_metrics(out, values, {"loss": values["total"], "held_out": held_out.get("total")})
    except BaseException:
        if trainer.ranks.rank == 0:
            shutil.rmtree(out, ignore_errors=True)
        raise


def commit() -> str | None:
    """The checked-out commit, or None outside a git repository."""
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
    source: FeatureSource,
    sources: list[SourceParams],
    ranks: Ranks,
) -> Photos | None:
    """Photos and encoders that stand in for empty tables, or None if everything is cached."""
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
        source,
        sources,
        ranks.device,
        hidden=missing["hidden states"],
        latents=missing["latents"],
    )


def lock(ranks: Ranks, work: Path) -> contextlib.AbstractContextManager[None]:
    """The stage's lock on rank 0, unless train.launch holds it for its ranks."""
    return exclusive("train", work) if ranks.rank == 0 and not launched() else contextlib.nullcontext()


def command_line() -> Parser:
    """Return the parser of a rank's command: the stage's options, and those launchers add."""
    parser = stage_parser(STAGE)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    return parser


def main(words: Sequence[str]) -> None:
    """Train as the rank that the environment specifies. `words`: the options of the train command."""
    die_with_parent()
    options = command_line().parse_args(words)
    params, resume = read_params(options), ResumeOptions.of(options.resume, options.other_ranks)
    run = params.run
    for name, value in settings(run.torch_device(), run.threads).items():
        os.environ.setdefault(name, value)
    ranks = Ranks.join(run.torch_device())
    try:
        with lock(ranks, Path(run.work)):
            train(ranks, params, resume)
        dist.destroy_process_group()
    except Exception as error:
        sys.exit(ranks.report(error))
    except KeyboardInterrupt:  # the launcher was interrupted too, and reports it
        sys.exit(130)


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
