"""Stage: what the frozen encoders make of the training photos, computed once: latents and hidden states.

`python -m pipelines.encode`
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from open_clip.model import CLIPVisionCfg
from PIL import Image
from pydantic import Field

from model.backbones.clip import load_clip
from model.backbones.diffusion import load_vae
from model.backbones.encoders import after_preparing
from model.backbones.hub import reading, resolve
from model.backbones.variant import Variant, load_variant
from model.inputs import augmented, encode_latents, shrink
from model.segment import square_crop
from params import BackbonesParams, RunParams, Section, cli, data_dir, load
from pipelines import segments, shards, subjects, tables
from pipelines.prefetch import prefetch
from pipelines.storage import Roots, SourceParams
from stage import digest_files

CODE = ("../stage.py", "encode.py", "segments.py", "prefetch.py", "subjects.py", "shards.py", "tables.py", "storage.py")
TABLES = ("latents", "features")
MOST_VALUES = 2**31 - 1  # of a shard's hidden states: Arrow counts the values of a list column in 32 bits


class EncodeParams(Section):
    """What is cached for training, and how much of it."""

    latents: bool  # VAE latents of targets
    hidden_states: bool  # of the image encoder, of references and positives
    augmentations: int = Field(ge=1)  # per photo: the plain segment, and this many less one placed at random on white
    margin: float  # white border of the plain segment, fraction of its longer side
    scale: tuple[float, float]  # longer side of a placed segment, fraction of the canvas
    single_photo_rotation: float  # degrees; turns (and flips) stand in for other views where there is one photo
    max_gigabytes: float  # hidden states that would take more are left out
    seed: int
    batch_size: int
    shard_subjects: int


@dataclass(frozen=True)
class Views:
    """What is encoded of a photo.

    Attributes:
        crop: the square that the diffusion model learns from, and its mask; None where the photo is no target.
        segments: the augmentations of its subject, as the image encoder reads them; none where it is a target only.
    """

    crop: tuple[Image.Image, np.ndarray] | None
    segments: list[torch.Tensor]


class EncodeWorker:
    """Encodes the photos of subjects; `decoders` threads make the next ones ready while the models compute."""

    def __init__(
        self, params: EncodeParams, variant: str, sources: Sequence[SourceParams], device: str, decoders: int = 0
    ) -> None:
        self.params, self.device, self.decoders, self.roots = params, device, decoders, Roots(sources)
        self.variant = load_variant(variant)
        size = params.batch_size
        self.encoder = load_clip(self.variant.image_encoder, device, batch_size=size) if params.hidden_states else None
        self.vae = load_vae(self.variant.diffusion, torch.float32, device) if params.latents else None

    def compute(self, payloads: Sequence[list[dict[str, Any]]]) -> list[shards.Rows]:
        results: list[shards.Rows] = [{"latents": [], "features": []} for _ in payloads]
        places = [rows for rows, frames in zip(results, payloads, strict=True) for _ in frames]
        frames = [frame for payload in payloads for frame in payload]
        for source in {frame["source"] for frame in frames}:
            self.roots[source]  # opened here, not by several threads at once
        latents, features = Batches(self.params.batch_size), Batches(self.params.batch_size)
        prepared = prefetch(self.prepare, frames, self.decoders, 2 * self.params.batch_size)
        for rows, frame, views in zip(places, frames, prepared, strict=True):
            if views.crop is not None:
                latents.add((rows["latents"], frame["frame_id"], *views.crop))
            for index, pixels in enumerate(views.segments):
                features.add((rows["features"], frame["frame_id"], index, pixels))
            self.encode(latents.full(), features.full())
        self.encode(latents.rest(), features.rest())
        return results

    def prepare(self, frame: dict[str, Any]) -> Views:
        """Read a photo and make what the models read of it; for threads."""
        image, mask = segments.read_segment(self.roots, frame)
        roles = frame["extra"]
        pixels: list[torch.Tensor] = []
        if roles["input"] and self.encoder is not None:
            views = (self.augment(frame, image, mask, index) for index in range(self.params.augmentations))
            pixels = [self.encoder.preprocess(view) for view in views]
        is_target = roles["target"] and self.vae is not None
        return Views(square_crop(image, mask, self.variant.resolution) if is_target else None, pixels)

    def encode(self, crops: Sequence[Any], views: Sequence[Any]) -> None:
        """Add the rows of `crops` (rows, frame_id, image, mask) and `views` (rows, frame_id, index, pixels)."""
        if crops:
            latents = encode_latents(self.vae, [c[2] for c in crops], self.params.batch_size, self.device)
            for (rows, frame_id, _, mask), latent in zip(crops, latents, strict=True):
                rows.append(latent_row(frame_id, latent, mask))
        if views and self.encoder is not None:
            ready = after_preparing(self.encoder)
            hidden = ready.hidden_states([v[3] for v in views], self.variant.image_encoder.layers).cpu().numpy()
            for (rows, frame_id, index, _), states in zip(views, hidden, strict=True):
                rows.append(feature_row(frame_id, index, states))

    def augment(self, frame: dict[str, Any], image: Image.Image, mask: np.ndarray, index: int) -> Image.Image:
        """Return augmentation `index` of a photo, the same one whenever it is asked for."""
        return augmented(
            frame["frame_id"],
            image,
            mask,
            index,
            single=frame["extra"]["single"],
            size=self.variant.resolution,
            seed=self.params.seed,
            margin=self.params.margin,
            scale=self.params.scale,
            rotation=self.params.single_photo_rotation,
        )


def latent_row(frame_id: str, latent: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """Return a row of the latents table: `latent` [C, h, w], `mask` of the crop it was made of."""
    channels, height, width = latent.shape
    return {
        "frame_id": frame_id,
        "latent": latent.astype(np.float16).reshape(-1),
        "channels": channels,
        "height": height,
        "width": width,
        "subject_mask": shrink(mask, height, width).reshape(-1),
    }


def feature_row(frame_id: str, augmentation: int, states: np.ndarray) -> dict[str, Any]:
    """Return a row of the features table: `states` [K, N, d]."""
    layers, tokens, width = states.shape
    return {
        "frame_id": frame_id,
        "augmentation": augmentation,
        "hidden": states.astype(np.float16).reshape(-1),
        "layers": layers,
        "tokens": tokens,
        "width": width,
    }


class Batches:
    """Items that wait until they fill a batch."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.waiting: list[Any] = []

    def add(self, item: Any) -> None:
        self.waiting.append(item)

    def full(self) -> list[Any]:
        """Take whole batches; what is over waits on."""
        count = len(self.waiting) // self.size * self.size
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken

    def rest(self) -> list[Any]:
        """Take what is left."""
        taken, self.waiting = self.waiting, []
        return taken


@dataclass(frozen=True)
class Needed:
    """What the triplets need of the photos with usable masks, a row each, in the order of the masks table.

    Columns and not a mapping by frame: of millions of photos it stays in the driver's memory.
    """

    target: np.ndarray
    """[rows] bool: its latent is needed."""
    input: np.ndarray
    """[rows] bool: it is a reference or positive, so its hidden states are."""
    single: np.ndarray
    """[rows] bool: it is the one photo of its subject."""
    dropped: int
    """Triplets left out because a mask of theirs is not usable."""

    @classmethod
    def read(cls, curate: Path, mask: Path) -> Needed:
        """Read it from the tables of these two stages."""
        photos = segments.usable_ids(mask)
        triplets = tables.read(curate, "triplets", ["reference", "positive", "target", "method"])
        whole = np.ones(len(triplets), dtype=bool)
        for role in ("reference", "positive", "target"):
            whole &= among(triplets[role], photos)
        kept = triplets.filter(pa.array(whole))
        return cls(
            target=among(photos, kept["target"]),
            input=among(photos, kept["reference"]) | among(photos, kept["positive"]),
            single=among(photos, kept.filter(pc.equal(kept["method"], "augment"))["reference"]),
            dropped=int((~whole).sum()),
        )

    def wanted(self, params: EncodeParams, mask: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (frame_id, mask and roles) of the photos of which something is to be written."""
        target = self.target & params.latents
        given = self.input & params.hidden_states
        rows = zip(segments.usable(mask), target.tolist(), given.tolist(), self.single.tolist(), strict=True)
        for (frame_id, row), is_target, is_input, is_single in rows:
            if is_target or is_input:
                yield frame_id, {**row, "target": is_target, "input": is_input, "single": is_single}


def among(values: pa.ChunkedArray, others: pa.ChunkedArray) -> np.ndarray:
    """Return which values are among the others [len(values)], bool."""
    return np.asarray(pc.is_in(values, value_set=others.combine_chunks()), dtype=bool)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a row."""

    latent: int
    """A target's latent (fp16) and mask."""
    hidden: int
    """One augmentation's hidden states (fp16)."""


def sizes(variant: Variant) -> Sizes:
    """Return what rows take, from the models' configurations: nothing is loaded, and only these files are fetched.

    Raises:
        ModelError: a configuration is missing or is none.
    """
    spec = variant.image_encoder
    folder = resolve(spec, ["open_clip_config.json"])
    with reading(spec.path, "an open_clip folder with open_clip_config.json"):
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        vision = CLIPVisionCfg(**config["model_cfg"]["vision_cfg"])
        tokens = 1 + int(np.prod(np.broadcast_to(vision.image_size, 2) // np.broadcast_to(vision.patch_size, 2)))
    folder = resolve(variant.diffusion, ["vae/config.json"])
    with reading(variant.diffusion.path, "a diffusers folder with vae/config.json"):
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        side = variant.resolution // 2 ** (len(vae["block_out_channels"]) - 1)
        channels = vae["latent_channels"]
    return Sizes(latent=side**2 * (2 * channels + 1), hidden=2 * len(spec.layers) * tokens * vision.width)


def within_budget(params: EncodeParams, row: Sizes, needed: Needed) -> EncodeParams:
    """Print what the tables will take at most, and return `params` without what is not to be written."""
    targets, inputs = int(needed.target.sum()), int(needed.input.sum())
    latents = targets * row.latent / 1e9
    hidden = inputs * params.augmentations * row.hidden / 1e9
    said = f"encode: latents of {targets} targets x {row.latent / 1e3:.1f} KB = {latents:.2f} GB"
    print(said if params.latents else f"{said}, switched off by encode.latents")
    said = f"encode: hidden states of {inputs} references and positives x {params.augmentations} augmentations"
    said = f"{said} x {row.hidden / 1e3:.1f} KB = {hidden:.2f} GB"
    fits = hidden <= params.max_gigabytes
    if not params.hidden_states:
        said = f"{said}, switched off by encode.hidden_states"
    elif not fits:
        said = (
            f"{said}, left out: more than encode.max_gigabytes = {params.max_gigabytes}; training then computes "
            "them at each step, so raise it, lower encode.augmentations or curate fewer photos if that is too slow"
        )
    print(said, flush=True)
    return params.model_copy(update={"hidden_states": params.hidden_states and fits})


def photos_in_shard(params: EncodeParams, row: Sizes) -> int:
    """Return how many photos' hidden states fit in one shard."""
    values = row.hidden // np.dtype(np.float16).itemsize
    return max(MOST_VALUES // (params.augmentations * values), 1)


def encoded_frames(out: Path) -> int:
    """Return how many photos have a latent or hidden states."""
    return len(pc.unique(pa.concat_tables(tables.read(out, name, ["frame_id"]) for name in TABLES)["frame_id"]))


def main() -> None:
    params, run = load("encode", EncodeParams), load("run", RunParams)
    variant_name = load("backbones", BackbonesParams).variant
    sources = load("sources", list[SourceParams])
    variant = load_variant(variant_name)
    out, here = data_dir() / "encode", Path(__file__).parent
    curate, mask = data_dir() / "curate", data_dir() / "mask"
    needed = Needed.read(curate, mask)
    row = sizes(variant)
    params = within_budget(params, row, needed)
    model = here.parent / "model"
    code = [*(here / name for name in CODE), model / "backbones", model / "inputs.py", model / "segment.py"]
    with shards.sole_writer("encode", run, out):
        summary = shards.run_stage(
            "encode",
            subjects.items(curate, segments.FRAME_COLUMNS, needed.wanted(params, mask)),
            partial(EncodeWorker, params, variant_name, sources, run.torch_device(), run.decoders),
            identity=[
                params.model_dump(exclude={"max_gigabytes", "shard_subjects", "latents", "hidden_states"}),
                digest_files(*code),
                [shards.digest_spec(spec) for spec in (variant.diffusion, variant.image_encoder)],
            ],
            kept="latents",
            others=["features"],
            out=out,
            run=run,
            shard_items=params.shard_subjects,
            shard_photos=photos_in_shard(params, row),
            locked=True,
        )
        summary.kept = encoded_frames(out)  # a photo may be a target, an input or both
        extra = {
            "triplets_dropped_for_masks": needed.dropped,
            **{name: tables.count(out, name) for name in TABLES},
        }
        shards.report("encode", summary, out, extra)


if __name__ == "__main__":
    from pipelines import encode  # under its own name: Ray unpickles the worker class by it

    cli(encode.main)
