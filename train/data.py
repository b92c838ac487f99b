"""Training samples: triplets of encoded frames, and which of them make the batch of a step.

Everything random is a function of (seed, step, place in the global batch), so that a run needs no data position in its
checkpoints and draws the same samples on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from model.objective import TrainingBatch
from model.prompt import noun_ends
from params import UserError
from pipelines import tables
from train.arrays import Arrays
from train.mixture import portions
from train.recipe import DropParams
from train.similarity import SubjectSimilarity
from train.uncached import Photos

# First words of the seeds, so that no two uses share a stream.
EPOCH, DRAW, NOISE = 1, 2, 3


@dataclass(frozen=True)
class TrainingSet:
    """Triplets whose three frames are encoded, one row each, and where their columns lie in the arrays."""

    triplet_ids: pa.Array
    class_names: pa.Array
    captions: pa.Array
    """Captions of the targets."""
    subjects: np.ndarray
    """[n] index of each triplet's subject in `similarity`."""
    sources: list[str]
    """Names of the sources the triplets come from, sorted."""
    source_of: np.ndarray
    """[subjects of `similarity`] index of each one's source in `sources`; 0 where a subject has no triplet."""
    reference: np.ndarray
    """[n] frame: row // augmentations of `arrays.hidden`, or row of `photos` where there are none."""
    positive: np.ndarray
    """[n] as `reference`."""
    target: np.ndarray
    """[n] row of `arrays.latents` and `arrays.masks`, or row of `photos` where there are none."""
    single: np.ndarray
    """[n] bool: the subject has one photo, so reference and positive are two augmentations of it."""
    augmentations: int
    similarity: SubjectSimilarity
    arrays: Arrays
    photos: Photos | None
    """What is computed at each step because it is not cached."""
    dropped: int
    """Triplets left out because a frame of theirs is not encoded, or their subject is not compared with others."""

    @classmethod
    def read(cls, data: Path, arrays: Arrays, pairing: str, photos: Photos | None = None) -> TrainingSet:
        """Read the tables under `data`, whose large columns are `arrays`; `photos` where one of them is not there.

        pairing: `triplet`, or `self`: reference and positive are the target's own frame.

        Raises:
            UserError: no triplet is left, augmentations are missing, or a caption lacks its class noun.
        """
        encode = data / "encode"
        triplets = tables.read(data / "curate", "triplets").combine_chunks()
        encoded = tables.read(encode, "latents", ["frame_id"])["frame_id"]
        if photos is not None and arrays.latents is None:
            encoded = photos.frame_ids
        if photos is not None and arrays.hidden is None:
            frames, augmentations = photos.frame_ids, photos.params.augmentations
            require_views(data.name, augmentations)
        else:
            frames, augmentations = augmented_frames(encode)
        similarity = SubjectSimilarity.read(data / "similarity", arrays.cosines)
        shown = ("target", "target") if pairing == "self" else ("reference", "positive")
        rows = {
            "reference": places(triplets[shown[0]], frames),
            "positive": places(triplets[shown[1]], frames),
            "target": places(triplets["target"], encoded),
            "subjects": places(triplets["subject_id"], similarity.subject_ids),
        }
        usable = np.all([row >= 0 for row in rows.values()], axis=0)
        if not usable.any():
            raise UserError(
                f"none of the {len(triplets)} triplets in {data / 'curate'} has all its frames encoded; run curate,"
                " mask, similarity and encode again and read why they dropped the photos"
            )
        kept = triplets.filter(pa.array(usable))
        captions, origins = captions_and_sources(data / "curate", kept["target"])
        require_nouns(captions, column(kept, "class_name"))
        sources = sorted(pc.unique(origins).to_pylist())
        source_of = np.zeros(len(similarity.subject_ids), dtype=np.int64)
        source_of[rows["subjects"][usable]] = pc.index_in(origins, value_set=pa.array(sources)).to_numpy()
        return cls(
            triplet_ids=column(kept, "triplet_id"),
            class_names=column(kept, "class_name"),
            captions=captions,
            single=pc.equal(column(kept, "method"), "augment").to_numpy(zero_copy_only=False),
            augmentations=augmentations,
            similarity=similarity,
            sources=sources,
            source_of=source_of,
            arrays=arrays,
            photos=photos,
            dropped=int((~usable).sum()),
            **{name: row[usable] for name, row in rows.items()},
        )

    def __len__(self) -> int:
        return len(self.subjects)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """C, h, w of a target's latent."""
        return cast(Photos, self.photos).latent_shape if self.arrays.latents is None else self.arrays.latents.shape[1:]

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        """K, N, d of a photo's hidden states."""
        return cast(Photos, self.photos).hidden_shape if self.arrays.hidden is None else self.arrays.hidden.shape[1:]


@dataclass(frozen=True)
class Draw:
    """The samples of one step, [C] each over the global batch."""

    grouping: int
    triplets: np.ndarray
    """Rows of the TrainingSet, each of another subject, all of one group."""
    reference_views: np.ndarray
    """Augmentation of each reference."""
    positive_views: np.ndarray
    timesteps: np.ndarray
    positive_timesteps: np.ndarray
    drop_image: np.ndarray
    drop_text: np.ndarray


class Sampler:
    """Which samples make the global batch of a step.

    An epoch puts the subjects of each group in a random order and cuts them into batches; what is left over of a group
    waits for the next epoch. With several groupings, epochs go round them. With a mixture, an epoch has a subject as
    often as its source's share asks: see `train.mixture`.
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
    ) -> None:
        """`timesteps` of the diffusion process; `independent`: positives get timesteps of their own; `mixture`: share
        of the samples by source.

        Raises:
            UserError: no group has `batch` subjects, or the mixture does not fit the sources.
        """
        self.data, self.batch_size, self.seed, self.drop = data, batch, seed, drop
        self.timesteps, self.independent = timesteps, independent
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
                f"train.batch = {batch} needs as many different subjects in one similarity group, and the largest has"
                f" {largest}; lower train.batch, or add subjects"
            )
        # Threads that read ahead ask for the next epoch while another still reads this one.
        self.epoch = lru_cache(maxsize=2)(self.draw_epoch)

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, batch in it) of a step."""
        rounds, rest = divmod(step, sum(self.lengths))
        for grouping, length in enumerate(self.lengths):
            if rest < length:
                return rounds * len(self.lengths) + grouping, rest
            rest -= length
        raise AssertionError

    def draw_epoch(self, epoch: int) -> np.ndarray:
        """Subjects [batches, C] of an epoch; `epoch` keeps the last ones."""
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
        single = self.data.single[triplets]
        # A plain reference, as at inference, and a placed positive; of a single photo any two augmentations, since the
        # plain one would repeat the target's pose.
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
            timesteps=timesteps,
            positive_timesteps=others if self.independent else timesteps,
            drop_image=(chance < image) | both,
            drop_text=((chance >= image) & (chance < text)) | both,
        )

    def noise(self, step: int, place: int, shape: Sequence[int]) -> np.ndarray:
        """Standard normal noise of one place of the global batch, float32."""
        return np.random.default_rng([self.seed, NOISE, step, place]).standard_normal(tuple(shape), dtype=np.float32)

    def batch(self, step: int, rank: int = 0, ranks: int = 1, device: torch.device | str = "cpu") -> TrainingBatch:
        """The rows of the global batch of `step` that are `rank`'s, in order of place, loaded to `device`."""
        return self.finish(self.read(step, rank, ranks), device)

    def read(self, step: int, rank: int = 0, ranks: int = 1) -> TrainingBatch:
        """`batch` as far as the CPU makes it: where the encoders' results are not cached, `reference` and `positive`
        hold what the image encoder reads [B, 3, s, s], `latents` the pictures [B, H, W, 3]. For threads."""
        data, draw = self.data, self.draw(step)
        size = self.batch_size // ranks
        mine = slice(rank * size, (rank + 1) * size)
        triplets = draw.triplets[mine]
        latents, masks = self.read_targets(data.target[triplets])
        reference, positive = self.read_views(triplets, draw.reference_views[mine], draw.positive_views[mine])
        everybody = data.subjects[draw.triplets]
        noise = [self.noise(step, rank * size + place, data.latent_shape) for place in range(size)]
        return TrainingBatch(
            latents=tensor(latents),
            subject_masks=tensor(masks).float() / 255,
            captions=data.captions.take(pa.array(triplets)).to_pylist(),
            class_nouns=data.class_names.take(pa.array(triplets)).to_pylist(),
            reference=reference,
            positive=positive,
            similarity=tensor(data.similarity.between(draw.grouping, everybody[mine], everybody)),
            subjects=tensor(everybody[mine].astype(np.int64)),
            timesteps=tensor(draw.timesteps[mine]),
            noise=tensor(np.stack(noise)),
            drop_image=tensor(draw.drop_image[mine]),
            drop_text=tensor(draw.drop_text[mine]),
            positive_timesteps=tensor(draw.positive_timesteps[mine]),
        )

    def read_targets(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Latents [B, C, h, w] float32, or pictures [B, H, W, 3] uint8, and masks [B, h, w] uint8 of targets."""
        arrays = self.data.arrays
        if arrays.latents is None or arrays.masks is None:
            return cast(Photos, self.data.photos).targets(rows)
        return arrays.latents[rows].astype(np.float32), arrays.masks[rows]

    def read_views(self, triplets: np.ndarray, *views: np.ndarray) -> list[torch.Tensor]:
        """Hidden states [B, K, N, d], or pixels [B, 3, s, s], of the references and of the positives."""
        data = self.data
        frames = [data.reference[triplets], data.positive[triplets]]
        if data.arrays.hidden is not None:
            hidden = data.arrays.hidden
            return [tensor(hidden[f * data.augmentations + v]) for f, v in zip(frames, views, strict=True)]
        photos, single = cast(Photos, data.photos), data.single[triplets]
        return [photos.pixels(f, v, single) for f, v in zip(frames, views, strict=True)]

    def finish(self, batch: TrainingBatch, device: torch.device | str) -> TrainingBatch:
        """What `read` gave, on `device`, and encoded where it is not cached."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(batch).items()
            if isinstance(value, torch.Tensor)
        }
        photos = self.data.photos
        if photos is not None and self.data.arrays.hidden is None:
            both = photos.hidden_states(torch.cat([moved["reference"], moved["positive"]])).to(device)
            moved["reference"], moved["positive"] = both.chunk(2)
        if photos is not None and self.data.arrays.latents is None:
            moved["latents"] = photos.latents(moved["latents"]).to(device)
        return replace(batch, **moved)


def tensor(values: np.ndarray) -> torch.Tensor:
    """Values as a tensor on the CPU."""
    return torch.from_numpy(np.ascontiguousarray(values))


def augmented_frames(folder: Path) -> tuple[pa.ChunkedArray, int]:
    """Frame ids of the features table, one for each frame, and how many augmentations every frame has.

    Raises:
        UserError: fewer than two, or not the same ones for every frame.
    """
    table = tables.read(folder, "features", ["frame_id", "augmentation"])
    numbers = table["augmentation"].to_numpy()
    count = int(numbers.max(initial=-1)) + 1
    whole = len(numbers) % max(count, 1) == 0
    if not whole or not np.array_equal(numbers, np.tile(np.arange(count), len(numbers) // max(count, 1))):
        raise UserError(f"{folder / 'features'}: frames differ in their augmentations; run encode again")
    require_views(str(folder / "features"), count)
    return table["frame_id"].take(pa.array(np.arange(0, len(numbers), max(count, 1)))), count


def require_views(where: str, augmentations: int) -> None:
    """Raise UserError where a photo has no other augmentation than the plain segment."""
    if augmentations == 1:
        raise UserError(
            f"{where} holds plain segments only, and a positive is one placed at random; set encode.augmentations to 2"
            " or more and run encode again"
        )


def captions_and_sources(folder: Path, targets: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """Captions and sources of frames, in their order.

    Raises:
        UserError: a frame is not in the frames table.
    """
    frames = tables.read(folder, "frames", ["frame_id", "caption", "source"])
    rows = places(targets, frames["frame_id"])
    if (rows < 0).any():
        missing = targets[int(np.argmin(rows))].as_py()
        raise UserError(f"{folder / 'frames'}: target '{missing}' of a triplet is missing; run curate again")
    found = frames.take(pa.array(rows))
    return column(found, "caption"), column(found, "source")


def require_nouns(captions: pa.Array, nouns: pa.Array) -> None:
    """Raise ModelError that names the first caption without its class noun; else it would stop the run half-way."""
    for caption, noun in sorted(set(zip(captions.to_pylist(), nouns.to_pylist(), strict=True))):
        noun_ends(caption, [noun])


def places(values: pa.ChunkedArray, known: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Where each of `values` stands in `known`, -1 where it does not."""
    known = known.combine_chunks() if isinstance(known, pa.ChunkedArray) else known
    found = pc.index_in(values, value_set=known)
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)


def column(table: pa.Table, name: str) -> pa.Array:
    """A column as one Arrow array."""
    return table[name].combine_chunks()
