"""Training samples: triplets, and the array rows of their photos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.backbones.diffusion import Diffusion
from model.methods.config import AdapterConfig
from model.prompt import Place, caption_length, noun_ends, tokens_needed
from pipelines import tables
from runtime.errors import UserError
from train.batches.arrays import Arrays
from train.batches.similarity import SubjectSimilarity
from train.batches.uncached import Photos

FIRST = "a photo of a {noun}, {caption}"
"""What a caption becomes whose noun lies beyond a text encoder's tokens, as with curate.captions.max_words."""


@dataclass(frozen=True)
class TrainingSet:
    """Triplets whose three frames are encoded, one row each, and the array rows that hold their columns."""

    triplet_ids: pa.Array
    class_names: pa.Array
    captions: pa.Array
    """Captions of the targets."""
    subjects: np.ndarray
    """[n] index of each triplet's subject in `similarity`."""
    sources: list[str]
    """Names of the sources the triplets come from, sorted."""
    source_of: np.ndarray
    """[subjects of `similarity`] index of each subject's source in `sources`; 0 if it has no triplet."""
    reference: np.ndarray
    """[n] frame: row // augmentations of `arrays.hidden`, or row of `photos` if that is None."""
    positive: np.ndarray
    """[n] as `reference`."""
    target: np.ndarray
    """[n] row of `arrays.latents` and `arrays.masks`, or row of `photos` if they are None."""
    own: np.ndarray
    """[n] as `reference`: the target's own photo; -1 where its hidden states are not cached."""
    angles: np.ndarray
    """[n] degrees between the viewing directions of reference and target; infinite if unknown, NaN for `single`."""
    single: np.ndarray
    """[n] bool: the subject has one photo, so reference and positive are two augmentations of it."""
    augmentations: int
    similarity: SubjectSimilarity
    arrays: Arrays
    photos: Photos | None
    """Source of the inputs that are not cached but computed at each step."""

    @classmethod
    def read(
        cls, data: Path, arrays: Arrays, pairing: str | Mapping[str, str], photos: Photos | None = None
    ) -> TrainingSet:
        """Read the tables under `data`, with their large columns in `arrays`; `photos` if one of those is missing.

        pairing: `triplet`, or `self`: reference and positive are the target's own frame; or one of them by source.

        Raises:
            UserError: there are no triplets, a triplet's photo is not encoded, its subject has no similarities,
                augmentations are missing, a caption lacks its class noun, or the sources of `pairing` are not those of
                the triplets.
        """
        encode = data / "encode"
        triplets = tables.read(data / "pairs", "triplets").combine_chunks()
        if not len(triplets):
            raise UserError(f"{data / 'pairs'} has no triplets; add photos of split train to sources and run pairs")
        encoded = tables.read(encode, "latents", ["frame_id"])["frame_id"]
        if photos is not None and arrays.latents is None:
            encoded = photos.frame_ids
        if photos is not None and arrays.hidden is None:
            frames, augmentations = photos.frame_ids, photos.params.augmentations
            require_views(data.name, augmentations)
        else:
            frames, augmentations = augmented_frames(encode)
        similarity = SubjectSimilarity.read(data / "similarity", arrays.cosines)
        captions, origins = captions_and_sources(data / "curate", triplets["target"])
        itself = paired_with_itself(origins, pairing)
        rows = {
            "reference": places(pc.if_else(itself, triplets["target"], triplets["reference"]), frames),
            "positive": places(pc.if_else(itself, triplets["target"], triplets["positive"]), frames),
            "target": places(triplets["target"], encoded),
            "subjects": places(triplets["subject_id"], similarity.subject_ids),
        }
        for role, found in rows.items():
            require_known(role, found, triplets, data)
        single = pc.equal(column(triplets, "method"), "augment").to_numpy(zero_copy_only=False)
        angles = triplets["reference_target_angle"].to_numpy().astype(np.float64)
        require_nouns(captions, column(triplets, "class_name"))
        sources = sorted(pc.unique(origins).to_pylist())
        source_of = np.zeros(len(similarity.subject_ids), dtype=np.int64)
        source_of[rows["subjects"]] = pc.index_in(origins, value_set=pa.array(sources)).to_numpy()
        return cls(
            triplet_ids=column(triplets, "triplet_id"),
            class_names=column(triplets, "class_name"),
            captions=captions,
            own=places(triplets["target"], frames),
            angles=np.where(single, np.nan, np.where(np.isnan(angles), np.inf, angles)),
            single=single,
            augmentations=augmentations,
            similarity=similarity,
            sources=sources,
            source_of=source_of,
            arrays=arrays,
            photos=photos,
            **rows,
        )

    def with_nouns_first(
        self, tokenizers: Sequence[tuple[Any, int]], tokens: int, place: Place = "after_noun"
    ) -> tuple[TrainingSet, int]:
        """Return the samples with their noun first (FIRST) where a text encoder would truncate it or its pseudo-word,
        and the number of them.

        tokenizers: each with the length of its captions, start and end included. tokens: of a pseudo-word, which stands
        at `place`.
        """
        pairs = list(zip(self.captions.to_pylist(), self.class_names.to_pylist(), strict=True))
        known = list(dict.fromkeys(pairs))
        texts, nouns = [caption for caption, _ in known], [noun for _, noun in known]
        long: set[tuple[str, str]] = set()
        for tokenizer, length in tokenizers:
            counts = tokens_needed(tokenizer, texts, nouns, tokens, place)
            long |= {pair for pair, count in zip(known, counts, strict=True) if count > length}
        first = [FIRST.format(noun=n, caption=c) if (c, n) in long else c for c, n in pairs]
        return replace(self, captions=pa.array(first, pa.string())), sum(pair in long for pair in pairs)

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


def paired_with_itself(origins: pa.Array, pairing: str | Mapping[str, str]) -> pa.Array:
    """Whether the target is its own reference, for targets of these sources [n], bool.

    Raises:
        UserError: a mapping lacks a source, or names another.
    """
    found = sorted(pc.unique(origins).to_pylist())
    by_source = dict.fromkeys(found, pairing) if isinstance(pairing, str) else pairing
    if sorted(by_source) != found:
        raise UserError(
            f"train.pairing has the sources {', '.join(sorted(by_source)) or 'none'}, but the triplets are of"
            f" {', '.join(found)}; give triplet or self for each of these"
        )
    alone = [source for source, how in by_source.items() if how == "self"]
    return pc.is_in(origins, value_set=pa.array(alone, pa.string()))


def augmented_frames(folder: Path) -> tuple[pa.ChunkedArray, int]:
    """Frame ids of the features table, one per frame, and the number of augmentations of every frame.

    Raises:
        UserError: there are fewer than two, or they differ between frames.
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
    """Raise UserError if photos have no augmentation other than the plain segment."""
    if augmentations == 1:
        raise UserError(
            f"{where} has only plain segments, but a positive is a randomly placed one; set encode.augmentations to 2"
            " or more and run encode again"
        )


def require_known(role: str, rows: np.ndarray, triplets: pa.Table, data: Path) -> None:
    """Raise UserError naming the first triplet whose photo or subject in this role is -1 (unknown)."""
    if (rows >= 0).all():
        return
    first = int(np.argmin(rows))
    name = triplets["triplet_id"][first].as_py()
    found = f"{int((rows < 0).sum())} of {len(rows)} triplets (first: {name})"
    if role == "subjects":
        raise UserError(f"{found} belong to subjects without similarities; run similarity and pairs again")
    raise UserError(
        f"{found} have a {role} that is not in the tables of {data / 'encode'}; run pairs and encode again, check"
        " encode's rejects, and with train.pairing self include target in encode.inputs"
    )


def captions_and_sources(folder: Path, targets: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """Captions and sources of frames, in the order of `targets`.

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
    """Raise ModelError naming the first caption without its class noun, which would otherwise stop the run midway."""
    for caption, noun in sorted(set(zip(captions.to_pylist(), nouns.to_pylist(), strict=True))):
        noun_ends(caption, [noun])


def require_room(
    diffusion: Diffusion, config: AdapterConfig, captions: Sequence[str], nouns: Sequence[str], advice: str
) -> None:
    """Raise UserError, ending in `advice`, if a text encoder would truncate a class noun or its pseudo-word."""
    if not config.textual:
        return
    pairs = sorted(set(zip(captions, nouns, strict=True)))
    for encoder, tokenizer in zip(diffusion.text_encoders, diffusion.tokenizers, strict=True):
        length = caption_length(encoder, tokenizer)
        texts, words = [caption for caption, _ in pairs], [noun for _, noun in pairs]
        counts = tokens_needed(tokenizer, texts, words, config.text_tokens, config.writing["place"])
        long = [(pair, count) for pair, count in zip(pairs, counts, strict=True) if count > length]
        if long:
            (caption, noun), count = long[0]
            raise UserError(
                f"{len(long)} of {len(pairs)} captions are too long up to their class noun (first: '{caption}', where"
                f" '{noun}' and its pseudo-word need {count} tokens, and the text encoder has {length}); {advice}"
            )


def places(values: pa.ChunkedArray, known: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Index of each of `values` in `known`, -1 if absent."""
    known = known.combine_chunks() if isinstance(known, pa.ChunkedArray) else known
    found = pc.index_in(values, value_set=known)
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)


def column(table: pa.Table, name: str) -> pa.Array:
    """A column as one Arrow array."""
    return table[name].combine_chunks()
