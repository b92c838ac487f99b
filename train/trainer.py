"""The training loop: frozen backbone, DeepSpeed engine around the adapter, all randomness in the sampler."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from model.adapter import Adapter
from model.backbones.diffusion import Diffusion, load_diffusion
from model.backbones.features.face import load_recogniser
from model.backbones.features.source import FACES, FeatureSource, black_features
from model.backbones.variant import FaceSpec, Variant
from model.methods.registry import METHODS
from model.objective import TrainingBatch
from model.prompt import checkpoint_text
from runtime.errors import UserError
from runtime.files import write_json
from train.batches.prefetch import Batches
from train.batches.sampler import Sampler
from train.batches.training_set import TrainingSet
from train.batches.validation import validation_batches
from train.curriculum import Curriculum
from train.distributed.checkpoint import Checkpoints
from train.distributed.engine import DTYPES, Objective, TrainedState, gradient_norm, start_engine
from train.distributed.memory import hidden_shape, latent_side, shapes_of
from train.distributed.ranks import Ranks
from train.logs.log import LOSSES, Measures, Record
from train.logs.progress import TrainingProgress
from train.logs.sheets import Samples
from train.recipe import ModelParams, TrainParams

# In an adapter's folder: the unaveraged weights, if it holds averages; and the adapter's provenance.
RAW, CARD = "raw", "card.json"


@dataclass
class Trainer:
    """One rank's part of a run."""

    params: TrainParams
    diffusion: Diffusion
    engine: Any
    """DeepSpeedEngine around an Objective."""
    trained: TrainedState
    sampler: Sampler
    batches: Batches
    """Its threads run until it is closed."""
    ranks: Ranks

    @property
    def adapter(self) -> Adapter:
        """The adapter being trained."""
        found: Adapter = self.engine.module.adapter
        return found

    @property
    def measures(self) -> Measures:
        """Quantities measured from a step's losses."""
        return Measures(self.sampler.timesteps, self.params.timestep_buckets)

    def fit(self, checkpoints: Checkpoints, folder: Path, held_out: TrainingSet | None) -> Record:
        """Train up to `params.steps`, resuming from the newest checkpoint if there is one; return the measurements.

        `folder` receives logs and sample sheets. `held_out`: validation data; None: no validation.

        Raises:
            UserError: the checkpoint is of a later step.
        """
        record = Record(self.params, self.measures)
        start, state = checkpoints.restore(self.trained)
        if state is not None:
            if start > self.params.steps:
                steps = self.params.steps
                raise UserError(
                    f"the checkpoint is of step {start}, beyond train.steps = {steps}; give at least as many"
                )
            record.restore(state)
            self.ranks.say(f"train: resuming at step {start} of {self.params.steps}")
        progress = TrainingProgress(record, start, folder, self.ranks.device) if self.ranks.rank == 0 else None
        validation = held_out and validation_batches(held_out, self.params, self.sampler.timesteps)
        pictures, sheets = self.params.pictures.every, self.sheets(validation or self.sampler, folder)
        for step in range(start, self.params.steps):
            record.training.add(step, self.step(step))
            last = step + 1 == self.params.steps
            if last:
                record.training.close(step)
            if validation and (last or (step + 1) % self.params.validation.every == 0):
                self.validate(step, validation, record)
            if progress is not None:
                progress.waited = self.batches.waited
                progress.advance()
            if pictures and (last or (step + 1) % pictures == 0):
                weights = self.trained.adapter_weights(ema=self.params.ema is not None)
                if sheets is not None and progress is not None:
                    progress.note(pictures=sheets.draw(weights, step + 1))
            if last or (step + 1) % self.params.checkpoint_every == 0:
                checkpoints.save(self.trained, step + 1, record.state())
        if progress is not None:
            progress.close()
        if sheets is not None:
            self.ranks.say(f"train: sample sheets in {sheets.folder}")
        return record

    def sheets(self, sampler: Sampler, folder: Path) -> Samples | None:
        """Sample sheets of the subjects in a sampler's first batch; None if disabled, and on ranks other than 0."""
        if not self.params.pictures.every or self.ranks.rank > 0:
            return None
        batch = replace(sampler.batch(0, device=self.ranks.device), black=self.sampler.black)
        return Samples.of(self.params.pictures, self.diffusion, self.adapter, batch, folder)

    def step(self, step: int) -> list[list[float]]:
        """One weight update; returns numerators and denominators of the columns of `Record.training`, averaged over
        ranks and micro steps.

        Raises:
            UserError: a loss or the gradient is not finite; names step, losses and triplets.
        """
        rate = self.params.learning_rate_at(step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        where, draws = f"step {step}", self.params.draws(step)
        rows, before = [], None
        for draw in draws:
            batch = self.batches.take(draw)
            losses, measured = self.losses(batch)
            rows.append(measured)
            self.require_finite(where, dict(zip(LOSSES, measured[0], strict=False)), self.sampler, draws)
            self.engine.backward(losses["total"])
            before = gradient_norm(self.engine)
            self.engine.step()
        numerators, denominators = np.mean(rows, axis=0).tolist()
        norm = float(self.engine.get_global_grad_norm()) if before is None else before
        # In fp16 the loss scaler skips such a step and lowers the scale.
        if self.params.precision != "fp16":
            values = dict(zip(LOSSES, numerators, strict=False)) | {"gradient norm": norm}
            self.require_finite(where, values, self.sampler, draws)
        if self.engine.was_step_applied():
            self.trained.average(step)
        return [[*numerators, rate, norm], [*denominators, 1.0, 1.0]]

    def losses(self, batch: TrainingBatch) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
        """Losses of this rank's rows of a batch, and `measures` averaged over all ranks."""
        losses = self.engine(batch)
        return losses, self.ranks.mean(self.measures.of(losses, batch.timesteps)).tolist()

    @torch.no_grad()
    def validate(self, step: int, batches: Sampler, record: Record) -> None:
        """Record the losses of the trained (not averaged) weights on the held-out batches after a 0-based step.

        Raises:
            UserError: one is not finite; names step, losses and triplets.
        """
        for draw in range(self.params.validation.batches):
            _, measured = self.losses(batches.batch(draw, self.ranks.rank, self.ranks.world, self.ranks.device))
            values = dict(zip(LOSSES, measured[0], strict=False))
            self.require_finite(f"validation after step {step}", values, batches, [draw])
            record.validation.add(step, measured)

    def require_finite(self, where: str, values: dict[str, float], sampler: Sampler, draws: Sequence[int]) -> None:
        """Raise UserError if any of `values`, computed from these batches of `sampler`, is not finite."""
        if torch.tensor(list(values.values())).isfinite().all():
            return
        found = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        triplets, broken = suspects(sampler, draws)
        advice = (
            "their cached latents or features are not finite: run encode again"
            if broken
            else "lower train.learning_rate or train.objective.contrastive_weight, or use another train.precision"
        )
        raise UserError(f"{where} has non-finite values ({found}) for triplets {', '.join(triplets)}; {advice}")

    def save(self, folder: Path, data_hash: str, card: dict[str, Any]) -> None:
        """Write the adapter from rank 0, in the precision it was trained in, and `card` beside it. Collective.

        With train.ema the adapter is the moving average, and `raw` holds the unaveraged weights.
        """
        averaged = self.params.ema is not None
        kinds = {"": self.trained.adapter_weights(ema=averaged)}
        if averaged:
            kinds[RAW] = self.trained.adapter_weights(ema=False)
        if self.ranks.rank == 0:
            temporary = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                for kind, weights in kinds.items():
                    adapter = Adapter(self.adapter.config)
                    adapter.load_state_dict(weights, assign=True)
                    adapter.save(temporary / kind, data_hash)
                write_json(temporary / CARD, card)
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        self.ranks.barrier()


def suspects(sampler: Sampler, draws: Sequence[int]) -> tuple[list[str], bool]:
    """Triplet ids of the batches, or only those with non-finite input if there are any (then True)."""
    ids: list[str] = []
    broken: list[str] = []
    for draw in draws:
        whole = sampler.batch(draw)
        inputs = (whole.latents, whole.reference, whole.positive)
        finite = torch.stack([rows.float().flatten(1).isfinite().all(dim=1) for rows in inputs]).all(dim=0)
        names = [sampler.data.triplet_ids[int(row)].as_py() for row in sampler.draw(draw).triplets]
        ids += names
        broken += [name for name, fine in zip(names, finite.tolist(), strict=True) if not fine]
    return broken or ids, bool(broken)


def build(
    params: TrainParams, model: ModelParams, variant: Variant, data: TrainingSet, ranks: Ranks, threads: int
) -> Trainer:
    """Load the backbone, create the adapter and wrap it in the engine."""
    require_precision(params, ranks.device)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(params.deterministic, warn_only=True)
    # Every new buffer would be filled with NaN, a tenth of a step; nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # ZeRO 3 itself moves each rank's share of the frozen weights to its device.
    place = torch.device("cpu") if params.zero_stage == 3 else ranks.device
    diffusion = load_diffusion(variant.diffusion, DTYPES[params.precision], place)
    vae, unet, scheduler = (cast(Any, part) for part in (diffusion.vae, diffusion.unet, diffusion.scheduler))
    if not params.pictures.every or ranks.rank > 0:
        vae.to("meta")  # latents are cached; only its config is read
    if params.gradient_checkpointing == "all":
        unet.enable_gradient_checkpointing()
    if params.gradient_checkpointing != "none":
        checkpoint_text(diffusion.text_encoders, by_layer=params.zero_stage == 3)
    if params.compile:
        unet.compile()
    sampler = Sampler(
        data,
        batch=params.batch,
        seed=params.seed,
        drop=params.drop,
        timesteps=scheduler.config.num_train_timesteps,
        independent=params.positive_timesteps == "independent",
        key_ratio=params.key_ratio,
        mixture=params.mixture,
        curriculum=Curriculum.of(params.curriculum, params.seed, params.steps, params.accumulation),
        black=(
            black_reference(model.features(variant), data, ranks.device)
            if METHODS[model.encoder].drops_to_black
            else None
        ),
        positives=METHODS[model.encoder].positives,
    )
    batches = Batches(
        sampler, ranks.rank, ranks.world, ranks.device, ahead=params.prefetch, steps=params.draws(params.steps)[0]
    )
    adapter = make_adapter(model, variant, diffusion, data, params.seed)
    objective = Objective(adapter, diffusion, params.objective.config(), sharded=params.zero_stage == 3)
    engine = start_engine(params, objective, ranks.world, ranks.device)
    return Trainer(params, diffusion, engine, TrainedState(engine, params.ema), sampler, batches, ranks)


def black_reference(source: FeatureSource, data: TrainingSet, device: torch.device) -> torch.Tensor:
    """Hidden states [1, K, N, d] of a black image, in fp16 as those of references; `data` may hold the encoder."""
    encoder = None if data.photos is None else data.photos.encoder
    return black_features(encoder or source.load(device), source.layers).half()


def require_precision(params: TrainParams, device: torch.device) -> None:
    """Raise UserError if the device does not support `params.precision`."""
    if params.precision == "fp16" and device.type == "cpu":
        raise UserError("train.precision fp16 needs a GPU; use fp32 or bf16, or set run.device to cuda")


def make_adapter(model: ModelParams, variant: Variant, diffusion: Diffusion, data: TrainingSet, seed: int) -> Adapter:
    """A new adapter for the backbone and the image features, installed in the UNet; `seed` sets its initial weights.

    Raises:
        UserError: latents or features were made by a different backbone.
    """
    source = model.features(variant)
    require_shapes(variant, source, data)
    unet = cast(Any, diffusion.unet)
    torch.manual_seed(seed)
    adapter = Adapter.for_unet(
        unet,
        base_model=diffusion.name,
        base_revision=diffusion.revision,
        image_encoder=source.name,
        feature_layers=source.layers,
        feature_width=data.hidden_shape[-1],
        text_widths=[text.config.hidden_size for text in diffusion.text_encoders],
        **model.sizes(source.network),
    )
    if model.encoder in FACES:
        start_words(adapter, model, variant, diffusion)
    adapter.install(unet)
    return adapter


def start_words(adapter: Adapter, model: ModelParams, variant: Variant, diffusion: Diffusion) -> None:
    """Give a new adapter of DreamIdentity the weights of the variant's face recogniser, if it trains it, and the
    statistics of names.

    Raises:
        UserError: the file of names cannot be read, or a name does not fit.
    """
    encoder = cast(Any, adapter.mfi)
    if encoder.face is not None:
        encoder.face.load_state_dict(load_recogniser(cast(FaceSpec, variant.face)).state_dict())
    if len(encoder.names):
        names = model.words.read_names()
        for found, *text in zip(encoder.names, diffusion.text_encoders, diffusion.tokenizers, strict=True):
            found.measure(*text, names)


def require_shapes(variant: Variant, source: FeatureSource, data: TrainingSet) -> None:
    """Raise UserError if latents or hidden states do not have the shapes the variant's models produce."""
    shapes = shapes_of(variant, source)
    side = latent_side(shapes)
    wanted = (shapes.unet["in_channels"], side, side, *hidden_shape(shapes))
    names = ["latent channels", "latent rows", "latent columns"]
    names += ["image-encoder layers", "image-encoder tokens", "values per token"]
    for name, found, expected in zip(names, (*data.latent_shape, *data.hidden_shape), wanted, strict=True):
        if found != expected:
            raise UserError(
                f"the encoded tables have {found} {name}, but variant '{variant.name}' has {expected}; run encode again"
            )
