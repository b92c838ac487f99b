"""The samples of each step's batch.

All randomness is a function of (seed, step, place in the global batch), so checkpoints need no data position and any
number of ranks draws the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch

from model.objective import TrainingBatch
from runtime.errors import UserError
from runtime.params import Band
from train.batches.mixture import portions
from train.batches.training_set import TrainingSet
from train.batches.uncached import Photos
from train.curriculum import Curriculum
from train.recipe import DropParams

EPOCH, DRAW, NOISE, KEYS = 1, 2, 3, 6
"""First elements of the seeds, so that no two uses share a stream; train.curriculum has 4 and 5."""


@dataclass(frozen=True)
class Draw:
    """The samples of one step, [C] each over the global batch."""

    grouping: int
    triplets: np.ndarray
    """Rows of the TrainingSet, each of a different subject, all from one group."""
    reference_views: np.ndarray
    """Augmentation of each reference."""
    positive_views: np.ndarray
    own: np.ndarray
    """Bool: the reference is the target's own photo."""
    scales: np.ndarray | None
    """Longer side of the subject in the reference, of the square; None: as in its augmentation."""
    timesteps: np.ndarray
    positive_timesteps: np.ndarray
    drop_image: np.ndarray
    drop_text: np.ndarray


class Sampler:
    """Chooses the samples of each step's global batch.

    An epoch shuffles the subjects of each group and cuts them into batches; a group's remainder waits for the next
    epoch. With several groupings, epochs cycle through them. With a mixture, a subject occurs in an epoch as often as
    its source's share requires: see `train.batches.mixture`.
    """

    def __init__(
        self,
        data: TrainingSet,
        *,
        batch: int,
        seed: int,
        drop: DropParams,
        timesteps: int,
        independent: bool,
        mixture: Mapping[str, float] | None = None,
        key_ratio: Band = (1.0, 1.0),
        curriculum: Curriculum | None = None,
        black: torch.Tensor | None = None,
        positives: bool = True,
    ) -> None:
        """`timesteps` of the diffusion process; `independent`: positives get their own timesteps; `mixture`: share of
        the samples per source; `key_ratio`: limits of `TrainingBatch.key_ratio`; `curriculum` of references;
        `black`: handed on in every batch; `positives`: False for a method that compares none, whose batches repeat
        the references instead.

        Raises:
            UserError: no group has `batch` subjects, the mixture does not fit the sources, or the curriculum needs
                hidden states that are not cached.
        """
        if curriculum is not None:
            require_own(data)
        self.curriculum, self.black, self.positives = curriculum, black, positives
        self.data, self.batch_size, self.seed, self.drop = data, batch, seed, drop
        self.timesteps, self.independent, self.key_ratio = timesteps, independent, key_ratio
        self.order = np.argsort(data.subjects, kind="stable")
        members, self.starts, self.counts = np.unique(data.subjects[self.order], return_index=True, return_counts=True)
        self.place = np.full(len(data.similarity.subject_ids), -1, dtype=np.int64)
        self.place[members] = np.arange(len(members))
        self.groups = [
            [members[groups[members] == group] for group in np.unique(groups[members]) if group >= 0]
            for groups in data.similarity.groups
        ]
        self.lengths = [sum(len(group) // batch for group in groups) for groups in self.groups]
        self.portions = None
        if mixture:
            self.portions = [portions(groups, data.source_of, data.sources, mixture, batch) for groups in self.groups]
            self.lengths = [sum(sum(portion.places) // batch for portion in found) for found in self.portions]
        if not min(self.lengths, default=0):
            largest = max((len(group) for groups in self.groups for group in groups), default=0)
            raise UserError(
                f"train.batch = {batch} needs that many different subjects in one similarity group, but the largest has"
                f" {largest}; lower train.batch, or add subjects"
            )
        # Prefetching threads request the next epoch while others still read this one.
        self.epoch = lru_cache(maxsize=2)(self.draw_epoch)

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, batch within the epoch) of a step."""
        rounds, rest = divmod(step, sum(self.lengths))
        for grouping, length in enumerate(self.lengths):
            if rest < length:
                return rounds * len(self.lengths) + grouping, rest
            rest -= length
        raise AssertionError

    def draw_epoch(self, epoch: int) -> np.ndarray:
        """Subjects [batches, C] of an epoch; `epoch` caches the last ones."""
        rng = np.random.default_rng([self.seed, EPOCH, epoch])
        size, grouping = self.batch_size, epoch % len(self.groups)
        if self.portions is not None:
            batches = [portion.batches(size, rng) for portion in self.portions[grouping]]
        else:
            batches = [
                rng.permutation(group)[: len(group) // size * size].reshape(-1, size) for group in self.groups[grouping]
            ]
        return rng.permutation(np.concatenate(batches))

    def draw(self, step: int) -> Draw:
        """The global batch of a step."""
        epoch, number = self.epoch_of(step)
        places_ = self.place[self.epoch(epoch)[number]]
        count, views = self.batch_size, self.data.augmentations
        rng = np.random.default_rng([self.seed, DRAW, step])
        triplets = self.order[self.starts[places_] + rng.integers(self.counts[places_])]
        own, scales = np.zeros(count, dtype=bool), None
        if self.curriculum is not None:
            rows = [self.order[self.starts[p] : self.starts[p] + self.counts[p]] for p in places_]
            choice = self.curriculum.choose(step, rows, self.data.angles)
            triplets, own, scales = choice.triplets, choice.own, choice.scales
        single = self.data.single[triplets]
        # A plain reference, as at inference, and a placed positive; for a single photo any two augmentations, since
        # the plain one would repeat the target's pose.
        reference = np.where(single, rng.integers(views, size=count), 0)
        positive = (reference + rng.integers(1, views, size=count)) % views
        timesteps, others = rng.integers(self.timesteps, size=(2, count))
        chance = rng.random(count)
        image, text = self.drop.image, self.drop.image + self.drop.text
        both = (chance >= text) & (chance < text + self.drop.both)
        return Draw(
            grouping=epoch % len(self.groups),
            triplets=triplets,
            reference_views=reference,
            positive_views=positive,
            own=own,
            scales=scales,
            timesteps=timesteps,
            positive_timesteps=others if self.independent else timesteps,
            drop_image=(chance < image) | both,
            drop_text=((chance >= image) & (chance < text)) | both,
        )

    def draw_key_ratio(self, step: int) -> float:
        """Share of the image features kept in a step, uniform between the limits."""
        return float(np.random.default_rng([self.seed, KEYS, step]).uniform(*self.key_ratio))

    def noise(self, step: int, place: int, shape: Sequence[int]) -> np.ndarray:
        """Standard normal noise for one place in the global batch, float32."""
        return np.random.default_rng([self.seed, NOISE, step, place]).standard_normal(tuple(shape), dtype=np.float32)

    def batch(self, step: int, rank: int = 0, ranks: int = 1, device: torch.device | str = "cpu") -> TrainingBatch:
        """The rows of `step`'s global batch that belong to `rank`, in order of place, on `device`."""
        return self.finish(self.read(step, rank, ranks), device)

    def read(self, step: int, rank: int = 0, ranks: int = 1) -> TrainingBatch:
        """The CPU part of `batch`, safe in threads: where encoder outputs are not cached, `reference` and `positive`
        hold the image encoder's input [B, 3, s, s], and `latents` the images [B, H, W, 3]."""
        data, draw = self.data, self.draw(step)
        size = self.batch_size // ranks
        mine = slice(rank * size, (rank + 1) * size)
        triplets = draw.triplets[mine]
        latents, masks = self.read_targets(data.target[triplets])
        reference, positive = self.read_views(step, draw, mine)
        subjects = data.subjects[draw.triplets]
        noise = [self.noise(step, rank * size + place, data.latent_shape) for place in range(size)]
        return TrainingBatch(
            latents=tensor(latents),
            subject_masks=tensor(masks).float() / 255,
            captions=data.captions.take(pa.array(triplets)).to_pylist(),
            class_nouns=data.class_names.take(pa.array(triplets)).to_pylist(),
            reference=reference,
            positive=positive,
            similarity=tensor(data.similarity.between(draw.grouping, subjects[mine], subjects)),
            subjects=tensor(subjects[mine].astype(np.int64)),
            timesteps=tensor(draw.timesteps[mine]),
            noise=tensor(np.stack(noise)),
            drop_image=tensor(draw.drop_image[mine]),
            drop_text=tensor(draw.drop_text[mine]),
            positive_timesteps=tensor(draw.positive_timesteps[mine]),
            key_ratio=self.draw_key_ratio(step),
            black=self.black,
        )

    def read_targets(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Latents [B, C, h, w] float32, or images [B, H, W, 3] uint8, and masks [B, h, w] uint8 of targets."""
        arrays = self.data.arrays
        if arrays.latents is None or arrays.masks is None:
            return cast(Photos, self.data.photos).targets(rows)
        return arrays.latents[rows].astype(np.float32), arrays.masks[rows]

    def read_views(self, step: int, draw: Draw, mine: slice) -> list[torch.Tensor]:
        """Hidden states [B, K, N, d], or pixels [B, 3, s, s], of the references and of the positives.

        Cached hidden states are of augmentations, so only pixels follow the curriculum's scales.
        """
        data, triplets = self.data, draw.triplets[mine]
        single, photos = data.single[triplets], data.photos

        def read(frames: np.ndarray, views: np.ndarray) -> torch.Tensor:
            if data.arrays.hidden is not None:
                return tensor(data.arrays.hidden[frames * data.augmentations + views])
            return cast(Photos, photos).pixels(frames, views, single)

        frames = np.where(draw.own[mine], data.own[triplets], data.reference[triplets])
        if self.curriculum is None or draw.scales is None or data.arrays.hidden is not None:
            reference = read(frames, draw.reference_views[mine])
        else:
            generators = [self.curriculum.generator(step, place) for place in range(self.batch_size)[mine]]
            reference = cast(Photos, photos).placed(frames, draw.scales[mine], generators, single)
        if not self.positives:
            return [reference, reference]
        return [reference, read(data.positive[triplets], draw.positive_views[mine])]

    def finish(self, batch: TrainingBatch, device: torch.device | str) -> TrainingBatch:
        """Move the result of `read` to `device`, and encode what is not cached."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(batch).items()
            if isinstance(value, torch.Tensor)
        }
        photos = self.data.photos
        if photos is not None and self.data.arrays.hidden is None:
            parts = [moved[name] for name in ("reference", "positive")][: 2 if self.positives else 1]
            found = photos.hidden_states(torch.cat(parts)).to(device).chunk(len(parts))
            moved["reference"], moved["positive"] = found[0], found[-1]
        if photos is not None and self.data.arrays.latents is None:
            moved["latents"] = photos.latents(moved["latents"]).to(device)
        if self.black is not None:
            moved["black"] = self.black.to(device)
        return replace(batch, **moved)


def require_own(data: TrainingSet) -> None:
    """Raise UserError if a target's hidden states are not cached, which a curriculum shows as a reference."""
    missing = int((data.own < 0).sum())
    if missing:
        raise UserError(
            f"train.curriculum shows targets as their own references, but those of {missing} of {len(data)} triplets"
            " have no cached hidden states; add target to encode.inputs and run encode again"
        )


def tensor(values: np.ndarray) -> torch.Tensor:
    """Values as a CPU tensor."""
    return torch.from_numpy(np.ascontiguousarray(values))
