"""Trains the small autoencoder between images and latents (a quarter of the side, 4 channels)."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from runtime.cli import guarded
from runtime.errors import UserError
from train.toybox.lessons import data
from train.toybox.lessons.augment import to_planes
from train.toybox.lessons.registry import FACES, TOYS
from train.toybox.loop import cards, loop

RECIPE = loop.Recipe(
    steps=4600,
    batch=16,
    lr=1e-3,
    warmup=300,
    average=0.998,
    weight_decay=0.0,
    betas=(0.9, 0.99),
    precision="bfloat16",
    seed=41,
)
CROP = 32
KL_WEIGHT = 2e-4
FOLDER = TOYS.weights / "diffusion" / "vae"


def build() -> Any:
    """An untrained autoencoder (side / 4, 4 channels) whose latents start almost noise-free."""
    depth = 3
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=data.SIZE,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -6.0  # log-variance: the noise of an untrained encoder would drown the signal
    return vae


def crops(images: np.ndarray, side: int, rng: np.random.Generator) -> Tensor:
    """One random crop per image: uint8 [B, H, W, 3] to float32 [B, 3, side, side] in -1..1."""
    top, left = rng.integers(0, images.shape[1] - side + 1, (2, len(images)))
    squares = [image[y : y + side, x : x + side] for image, y, x in zip(images, top, left, strict=True)]
    return to_planes(torch.from_numpy(np.stack(squares))) / 127.5 - 1


def main(words: Sequence[str]) -> None:
    training = loop.options("Train the small autoencoder.", {TOYS.name: RECIPE}, words)
    recipe = training.recipe
    torch.manual_seed(recipe.seed)
    vae = build()
    sets = [data.open_set(TOYS, "pictures")]

    def loss(draw: loop.LessonDraw) -> tuple[Tensor, dict[str, float]]:
        images, _, _ = data.batch(sets, draw.batch, draw.rng)
        target = crops(images, CROP, draw.rng).to(draw.device)
        where = vae.encode(target.to(next(vae.parameters()).dtype)).latent_dist
        mean, logvar = where.mean.float(), where.logvar.float()
        noise = torch.randn(mean.shape, generator=draw.noise).to(draw.device)
        code = mean + noise * (0.5 * logvar).exp()
        output = vae.decode(code.to(where.mean.dtype)).sample.float()
        square = (output - target).square().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        total = 4 * square + (output - target).abs().mean() + KL_WEIGHT * kl
        psnr = -10 * (square / 4).log10()
        return total, {"psnr": psnr.item(), "kl": kl.item(), "std": mean.std().item()}

    loop.fit(vae, loss, recipe, training.run("vae"), training.minutes)
    export(vae, sets, training)


def export(vae: Any, sets: list[data.Pictures], training: loop.Training) -> None:
    """Write the diffusers folder with a measured scaling factor: 1 / standard deviation of the latents."""
    vae.register_to_config(scaling_factor=round(1 / latent_spread(vae, sets[0]), 4))
    vae.save_config(FOLDER)
    cards.save_half(vae.state_dict(), FOLDER / "diffusion_pytorch_model.safetensors")
    cards.write(FOLDER, training.run("vae"), training.recipe, sets, measure(vae))


def load_vae() -> tuple[Any, str]:
    """The trained autoencoder and a digest of its weights; raises UserError if there is none."""
    weights = FOLDER / "diffusion_pytorch_model.safetensors"
    if not weights.exists():
        raise UserError(f"{weights} is missing; train the autoencoder first with `python -m train.toybox.models.vae`")
    vae: Any = AutoencoderKL.from_pretrained(FOLDER, torch_dtype=torch.float32)
    vae.requires_grad_(False)
    parts = [p.numpy().tobytes() for _, p in sorted(vae.named_parameters())]
    return vae, hashlib.sha256(b"".join(parts)).hexdigest()[:12]


@torch.no_grad()
def encoded(vae: Any, images: NDArray[np.uint8]) -> Iterator[Tensor]:
    """Latents (unscaled means, [b, 4, 16, 16]) of uint8 images [N, 64, 64, 3], a few at a time.

    Small channels-last batches suit CPU caches best: 1.3 times the rate of channels-first batches of 64.
    """
    device = loop.best_device()
    step = 16 if device.type == "cpu" else 256
    dtype = loop.fast_dtype(device)
    vae.to(device, dtype, memory_format=torch.channels_last)
    for start in range(0, len(images), step):
        pixels = to_planes(torch.tensor(images[start : start + step])) / 127.5 - 1
        pixels = pixels.to(device, dtype, memory_format=torch.channels_last)
        yield vae.encode(pixels).latent_dist.mean
    vae.to("cpu", torch.float32)


DECODED = {TOYS.name: 12_000, FACES.name: 6_000}
"""Number of images the perception models also see as decoded by the autoencoder: generated ones will look like that."""


@torch.no_grad()
def decoded(pictures: data.Pictures) -> data.Pictures:
    """The first `DECODED` images of a set, encoded and decoded once per autoencoder."""
    vae, stamp = load_vae()
    count = min(DECODED[pictures.world.name], len(pictures))
    path = pictures.world.work / "latents" / f"{pictures.spec.name}-decoded-{stamp}.npy"
    if not path.exists():
        parts = []
        for code in encoded(vae, pictures.images[:count]):
            output = (vae.decode(code).sample.float().clamp(-1, 1) + 1) * 127.5
            parts.append(output.round().byte().permute(0, 2, 3, 1).cpu().numpy())
            if len(parts) % 100 == 0:
                print(f"decoded: {pictures.spec.name} {len(parts) * len(code)} of {count}", flush=True)
        data.save_array(path, np.concatenate(parts))
    images = np.load(path, mmap_mode="r")
    spec = replace(pictures.spec, name=f"{pictures.spec.name}, decoded", subjects=len(images) // pictures.spec.views)
    return data.Pictures(
        pictures.world, spec, images, pictures.regions[: len(images)], pictures.attributes[: len(images)], stamp
    )


@torch.no_grad()
def latent_spread(vae: Any, pictures: data.Pictures, count: int = 512) -> float:
    """Standard deviation of the latent means over some images."""
    pixels = to_planes(torch.tensor(pictures.images[:count])) / 127.5 - 1
    return float(torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)]).std())


@torch.no_grad()
def measure(vae: Any) -> dict[str, float]:
    """Mean peak signal-to-noise ratio in dB over images of held-out subjects, and the latents' standard deviation."""
    held = data.open_set(TOYS, "pictures-test")
    found: list[Tensor] = []
    for rows in (slice(i, i + 64) for i in range(0, 960, 64)):
        pixels = to_planes(torch.tensor(held.images[rows])) / 127.5 - 1
        output = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        found.append(-10 * ((output - pixels).square().mean((1, 2, 3)) / 4).log10())
    return {"psnr": round(float(torch.cat(found).mean()), 2), "latent_std": round(latent_spread(vae, held), 3)}


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
