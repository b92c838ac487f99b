"""Subjects held out of training, and the validation losses on them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pyarrow as pa

from runtime.errors import UserError
from train.batches.sampler import Sampler
from train.batches.training_set import TrainingSet
from train.recipe import DropParams, TrainParams

COLUMNS = ("subjects", "reference", "positive", "target", "own", "angles", "single")
"""Arrays of a TrainingSet with a row per triplet."""
# All conditions are kept: dropping one would only add noise.
COMPLETE = DropParams(image=0, text=0, both=0)


def hold_out(data: TrainingSet, count: int, batch: int) -> tuple[TrainingSet, TrainingSet | None]:
    """Split `data` into the training set and the triplets of `count` held-out subjects (None for 0).

    The held-out subjects are those with the smallest id hashes in the largest group of the first grouping, so that they
    are comparable with each other and adding or removing subjects leaves most of them unchanged.

    Raises:
        UserError: they would be fewer than `batch`, more than the group has, or leave no batch to train on.
    """
    if count == 0:
        return data, None
    if count < batch:
        raise UserError(
            f"train.validation.subjects = {count} is less than train.batch = {batch}, and contrastive losses with fewer"
            " candidates are not comparable; hold out at least that many, or 0"
        )
    present = np.unique(data.subjects)
    groups = data.similarity.groups[0][present]
    numbers, sizes = np.unique(groups[groups >= 0], return_counts=True)
    largest, *others = sorted(zip(-sizes, numbers, strict=True))
    group = present[groups == largest[1]]
    if len(group) < count or max([len(group) - count, *(-size for size, _ in others)]) < batch:
        raise UserError(
            f"train.validation.subjects = {count} and train.batch = {batch} need more subjects in one similarity group"
            f" than the {len(group)} in the largest; lower one of them, set train.validation.subjects to 0, or add"
            " subjects"
        )
    ids = data.similarity.subject_ids.take(pa.array(group)).to_pylist()
    chosen = group[np.argsort([hashlib.blake2b(name.encode()).hexdigest() for name in ids])[:count]]
    held_out = np.isin(data.subjects, chosen)
    first = replace(
        data.similarity,
        **{name: getattr(data.similarity, name)[:1] for name in ("groups", "blocks", "positions")},
    )
    return where(data, ~held_out), replace(where(data, held_out), similarity=first)


def where(data: TrainingSet, kept: np.ndarray) -> TrainingSet:
    """The triplets of `data` where `kept` [n] is True."""
    columns = {name: getattr(data, name).filter(pa.array(kept)) for name in ("triplet_ids", "class_names", "captions")}
    rows = {name: getattr(data, name)[kept] for name in COLUMNS}
    return replace(data, **columns, **rows)


def validation_batches(held_out: TrainingSet, params: TrainParams, timesteps: int) -> Sampler:
    """Sampler of the `params.validation.batches` validation batches: its steps 0, 1, ..., always the same samples,
    noise and timesteps."""
    return Sampler(
        held_out,
        batch=params.batch,
        seed=params.seed,
        drop=COMPLETE,
        timesteps=timesteps,
        independent=params.positive_timesteps == "independent",
        key_ratio=params.key_ratio,
    )
