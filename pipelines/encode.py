"""Stage: what the frozen encoders make of the training photos, computed once: latents and hidden states.

`python -m pipelines.encode`
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from model.backbones.clip import load_clip
from model.backbones.diffusion import load_vae
from model.backbones.frozen import fixed_batches
from model.backbones.variant import load_variant
from model.segment import on_white, place_on_white, square_crop
from params import BackbonesParams, RunParams, Section, UserError, cli, data_dir, load
from pipelines import segments, shards, subjects, tables
from pipelines.storage import Roots, SourceParams
from stage import digest_files

CODE = ("../stage.py", "encode.py", "segments.py", "subjects.py", "shards.py", "tables.py", "storage.py")
# Sizes differ by model only; one forward pass on a blank picture tells them before the run.
BLANK = Image.new("RGB", (64, 64), "white")


class EncodeParams(Section):
    """What is cached for training, and how much of it."""

    augmentations: int  # per photo: the plain segment, and this many less one placed at random on white
    margin: float  # white border of the plain segment, fraction of its longer side
    scale: tuple[float, float]  # longer side of a placed segment, fraction of the canvas
    single_photo_rotation: float  # degrees; turns (and flips) stand in for other views where there is one photo
    max_gigabytes: float  # a run that would write more stops before it starts
    seed: int
    batch_size: int
    shard_subjects: int


class EncodeWorker:
    """Encodes the photos of subjects."""

    def __init__(self, params: EncodeParams, variant: str, sources: Sequence[SourceParams], device: str) -> None:
        self.params, self.device, self.roots = params, device, Roots(sources)
        self.variant = load_variant(variant)
        spec = self.variant.image_encoder
        self.encoder = load_clip(spec, device, batch_size=params.batch_size)
        self.vae = load_vae(self.variant.diffusion, torch.float32, device)

    def compute(self, payloads: Sequence[list[dict[str, Any]]]) -> list[shards.Rows]:
        frames = [frame for payload in payloads for frame in payload]
        photos = segments.read_segments(self.roots, frames)
        latents = iter(self.latent_rows(frames, photos))
        features = iter(self.feature_rows(frames, photos))
        count = self.params.augmentations
        return [
            {
                "latents": [next(latents) for _ in payload],
                "features": [next(features) for _ in range(count * len(payload))],
            }
            for payload in payloads
        ]

    def latent_rows(
        self, frames: Sequence[dict[str, Any]], photos: Sequence[tuple[Image.Image, np.ndarray]]
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of the latents table."""
        crops = [square_crop(image, mask, self.variant.resolution) for image, mask in photos]
        latents = encode_latents(self.vae, [image for image, _ in crops], self.params.batch_size, self.device)
        for frame, latent, (_, mask) in zip(frames, latents, crops, strict=True):
            channels, height, width = latent.shape
            yield {
                "frame_id": frame["frame_id"],
                "latent": latent.astype(np.float16).reshape(-1),
                "channels": channels,
                "height": height,
                "width": width,
                "subject_mask": shrink(mask, height, width).reshape(-1),
            }

    def feature_rows(
        self, frames: Sequence[dict[str, Any]], photos: Sequence[tuple[Image.Image, np.ndarray]]
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of the features table: augmentation 0 is the plain segment."""
        views = [
            (frame["frame_id"], index, self.augment(frame, image, mask, index))
            for frame, (image, mask) in zip(frames, photos, strict=True)
            for index in range(self.params.augmentations)
        ]
        hidden = self.encoder.hidden_states([view for _, _, view in views], self.variant.image_encoder.layers)
        for (frame_id, index, _), states in zip(views, hidden.cpu().numpy(), strict=True):
            yield {
                "frame_id": frame_id,
                "augmentation": index,
                "hidden": states.astype(np.float16).reshape(-1),
                "layers": states.shape[0],
                "tokens": states.shape[1],
                "width": states.shape[2],
            }

    def augment(self, frame: dict[str, Any], image: Image.Image, mask: np.ndarray, index: int) -> Image.Image:
        """Return augmentation `index` of a photo, the same one whenever it is asked for."""
        if index == 0:
            return on_white(image, mask, margin=self.params.margin)
        single = frame["extra"]["single"]
        return place_on_white(
            image,
            mask,
            self.variant.resolution,
            np.random.default_rng([self.params.seed, zlib.crc32(frame["frame_id"].encode()), index]),
            scale=self.params.scale,
            flip=single,
            rotation=self.params.single_photo_rotation if single else 0.0,
        )


@torch.no_grad()
def encode_latents(vae: Any, images: Sequence[Image.Image], batch_size: int, device: str) -> np.ndarray:
    """Return the scaled latents [B, C, h, w] of square RGB images, means of the posterior, so that they are no draw."""
    rows = []
    for batch, count in fixed_batches(images, batch_size):
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in batch])).permute(0, 3, 1, 2)
        posterior = vae.encode(pixels.to(device, vae.dtype) / 127.5 - 1.0).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        rows.append(((posterior.mean - shift) * vae.config.scaling_factor)[:count].float().cpu())
    return torch.cat(rows).numpy()


def shrink(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return how much of each latent cell is subject, uint8 [height, width], 255 = all of it."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(grey.resize((width, height), Image.Resampling.BOX))


def needed_frames(curate: Path, mask: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return, by frame_id, mask and role of the frames of triplets with usable masks, and how many triplets are not."""
    usable = segments.usable_masks(mask)
    needed: dict[str, dict[str, Any]] = {}
    dropped = 0
    for row in tables.rows(curate, "triplets"):
        frames = [row[role] for role in ("reference", "positive", "target")]
        if not all(frame in usable for frame in frames):
            dropped += 1
            continue
        for frame in frames:
            needed[frame] = {**usable[frame], "single": row["method"] == "augment"}
    return needed, dropped


def tell_size(worker: EncodeWorker, count: int, limit: float) -> None:
    """Print what the tables of `count` photos take.

    Raises:
        UserError: more than `limit` gigabytes.
    """
    states = worker.encoder.hidden_states([BLANK], worker.variant.image_encoder.layers).numel()
    side = worker.variant.resolution
    latent = encode_latents(worker.vae, [BLANK.resize((side, side))], 1, worker.device).size
    features_bytes, latents_bytes = 2 * states * worker.params.augmentations, 3 * latent
    total = count * (features_bytes + latents_bytes) / 1e9
    print(
        f"encode: {count} photos x ({latents_bytes / 1e3:.0f} KB latent and mask + {features_bytes / 1e3:.0f} KB "
        f"hidden states) = {total:.2f} GB at most",
        flush=True,
    )
    if total > limit:
        raise UserError(
            f"encode would write {total:.1f} GB, more than encode.max_gigabytes = {limit}; raise it, lower "
            "encode.augmentations or curate fewer photos"
        )


def main() -> None:
    params, run = load("encode", EncodeParams), load("run", RunParams)
    variant_name = load("backbones", BackbonesParams).variant
    sources = load("sources", list[SourceParams])
    variant = load_variant(variant_name)
    out, here = data_dir() / "encode", Path(__file__).parent
    needed, dropped = needed_frames(data_dir() / "curate", data_dir() / "mask")
    tell_size(EncodeWorker(params, variant_name, sources, "cpu"), len(needed), params.max_gigabytes)
    model = here.parent / "model"
    code = [*(here / name for name in CODE), model / "backbones", model / "segment.py"]
    summary = shards.run_stage(
        "encode",
        subjects.items(data_dir() / "curate", segments.FRAME_COLUMNS, needed),
        partial(EncodeWorker, params, variant_name, sources, run.torch_device()),
        identity=[
            params.model_dump(exclude={"max_gigabytes", "shard_subjects"}),
            digest_files(*code),
            [shards.digest_spec(spec) for spec in (variant.diffusion, variant.image_encoder)],
        ],
        kept="latents",
        others=["features"],
        out=out,
        run=run,
        shard_items=params.shard_subjects,
    )
    shards.report("encode", summary, out, {"triplets_dropped_for_masks": dropped})


if __name__ == "__main__":
    from pipelines import encode  # under its own name: Ray unpickles the worker class by it

    cli(encode.main)
