"""What the triplets need of each photo, and how much space it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.backbones.features.source import FeatureSource
from model.backbones.hub import reading, resolve
from model.backbones.variant import Variant
from pipelines import tables
from pipelines.encode.worker import EncodeParams
from pipelines.photos import segments

MOST_VALUES = 2**31 - 1
"""Maximum in a shard's hidden states: Arrow counts the values of a list column in 32 bits."""


@dataclass(frozen=True)
class Needed:
    """What the triplets need of the photos with usable masks, one row each, in the order of the masks table.

    Columns rather than a mapping by frame, so that millions of photos fit in the driver's memory.
    """

    target: np.ndarray
    """[rows] bool: its latent is needed."""
    input: np.ndarray
    """[rows] bool: it has a role whose hidden states are cached."""
    single: np.ndarray
    """[rows] bool: it is its subject's only photo."""

    @classmethod
    def read(cls, pairs: Path, mask: Path, params: EncodeParams) -> Needed:
        """Read the needs from the tables of these two stages."""
        photos = segments.usable_ids(mask)
        triplets = tables.read(pairs, "triplets", ["reference", "positive", "target", "method"])
        given = [among(photos, triplets[role]) for role in params.inputs]
        return cls(
            target=among(photos, triplets["target"]),
            input=np.logical_or.reduce(given) if given else np.zeros(len(photos), dtype=bool),
            single=among(photos, triplets.filter(pc.equal(triplets["method"], "augment"))["reference"]),
        )

    def wanted(self, params: EncodeParams, mask: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (frame_id, mask and roles) of the photos that have something to write."""
        target = self.target & params.latents
        given = self.input & params.hidden_states
        rows = zip(segments.usable(mask), target.tolist(), given.tolist(), self.single.tolist(), strict=True)
        for (frame_id, row), is_target, is_input, is_single in rows:
            if is_target or is_input:
                yield frame_id, {**row, "target": is_target, "input": is_input, "single": is_single}


def among(values: pa.ChunkedArray, others: pa.ChunkedArray) -> np.ndarray:
    """Return whether each value is among the others [len(values)], bool."""
    return np.asarray(pc.is_in(values, value_set=others.combine_chunks()), dtype=bool)


@dataclass(frozen=True)
class RowSizes:
    """Bytes per row."""

    latent: int
    """A target's latent (fp16) and mask."""
    hidden: int
    """One augmentation's hidden states (fp16)."""


def sizes(variant: Variant, source: FeatureSource) -> RowSizes:
    """Return the bytes per row, from the models' configurations: nothing is loaded, and only these files are fetched.

    source: the encoder of the hidden states.

    Raises:
        ModelError: a configuration is missing or invalid.
    """
    hidden = int(np.prod(source.shape))
    folder = resolve(variant.diffusion, ["vae/config.json"])
    with reading(variant.diffusion.path, "a diffusers folder with vae/config.json"):
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        side = variant.resolution // 2 ** (len(vae["block_out_channels"]) - 1)
        channels = vae["latent_channels"]
    return RowSizes(latent=side**2 * (2 * channels + 1), hidden=2 * hidden)


def within_budget(params: EncodeParams, row: RowSizes, needed: Needed) -> EncodeParams:
    """Print the maximum size of the tables, and return `params` without what is not written."""
    targets, inputs = int(needed.target.sum()), int(needed.input.sum())
    latents = targets * row.latent / 1e9
    hidden = inputs * params.augmentations * row.hidden / 1e9
    line = f"encode: latents of {targets} targets x {row.latent / 1e3:.1f} KB = {latents:.2f} GB"
    print(line if params.latents else f"{line}, switched off by encode.latents")
    line = f"encode: hidden states of {inputs} inputs x {params.augmentations} augmentations"
    line = f"{line} x {row.hidden / 1e3:.1f} KB = {hidden:.2f} GB"
    fits = hidden <= params.max_gigabytes
    if not params.hidden_states:
        line = f"{line}, switched off by encode.hidden_states"
    elif not fits:
        line = (
            f"{line}, left out: more than encode.max_gigabytes = {params.max_gigabytes}; training then computes "
            "them at each step, so raise it, lower encode.augmentations or curate fewer photos if that is too slow"
        )
    print(line, flush=True)
    return params.model_copy(update={"hidden_states": params.hidden_states and fits})


def photos_in_shard(params: EncodeParams, row: RowSizes) -> int:
    """Return how many photos' hidden states fit in one shard."""
    values = row.hidden // np.dtype(np.float16).itemsize
    return max(MOST_VALUES // (params.augmentations * values), 1)
