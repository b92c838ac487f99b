"""Trains the small Stable Diffusion: a UNet on the autoencoder's latents, jointly with its text encoder."""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from runtime.cli import guarded
from train.toybox.lessons import data
from train.toybox.lessons.registry import FACES, TOYS
from train.toybox.lessons.tokens import LENGTH, write_tokenizer
from train.toybox.loop import cards, loop
from train.toybox.models import face, judge, paint, vae

RECIPE = loop.Recipe(
    steps=9000,
    batch=48,
    lr=2e-3,
    warmup=500,
    average=0.999,
    weight_decay=0.01,
    precision="bfloat16",
    muon=True,
    seed=61,
    every=4,
)
# Starts from the toys' network, which knows scenes, styles and accessories: what is new is people, and 128 names.
RECIPES = {TOYS.name: RECIPE, FACES.name: replace(RECIPE, steps=4000, lr=1.5e-3, warmup=200)}
PICTURES = 48_000
"""Number of images of a set that are encoded and trained on."""

SHARES = {TOYS.name: {"pictures": 1.0}, FACES.name: {"celebrities": 0.55, "pictures": 0.45}}
"""Sets, and their shares of a batch. More than half for names: 128 people are harder to tell apart than traits."""

DROP = 0.1
"""Fraction of captions left empty, for classifier-free guidance."""

SAID = {TOYS.name: {"full": 0.7, "colour": 0.15, "noun": 0.15}, FACES.name: {"full": 0.8, "noun": 0.2}}
"""How often a caption tells as much of the subject."""

EARLY = 0.75
"""Exponent of the uniform draw of the timestep: below 1, the noisy end is sampled more often."""


def build_scheduler() -> Any:
    """Stable Diffusion's schedule with zero terminal SNR (Lin et al. 2024), for v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,  # the default clips unit-variance latents at 1, which inverts colours
        set_alpha_to_one=True,
    )


class TextToImage(nn.Module):
    """UNet and text encoder, trained jointly."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.unet: Any = UNet2DConditionModel(
            sample_size=data.SIZE // 4,
            in_channels=4,
            out_channels=4,
            block_out_channels=(48, 96, 160),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=128,
            attention_head_dim=(2, 2, 4),  # number of heads, despite its name
            norm_num_groups=8,
        )
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=words,
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=LENGTH,
                hidden_act="gelu",
                bos_token_id=words - 2,
                eos_token_id=words - 1,
                pad_token_id=words - 1,
            )
        )

    def forward(self, noisy: Tensor, steps: Tensor, words: Tensor) -> Tensor:
        """v [B, 4, h, w] for noisy latents of the same shape, timesteps [B] and token ids [B, LENGTH]."""
        states = self.text(input_ids=words).last_hidden_state
        found: Tensor = self.unet(noisy, steps, encoder_hidden_states=states, return_dict=False)[0]
        return found


def latents_of(autoencoder: Any, pictures: data.Pictures, count: int, stamp: str) -> NDArray[np.float16]:
    """Scaled latents [count, 4, 16, 16] of a set's first images, computed once per autoencoder (`stamp`)."""
    path = pictures.world.work / "latents" / f"{pictures.spec.name}-{count}-{stamp}.npy"
    if not path.exists():
        parts = []
        for code in vae.encoded(autoencoder, pictures.images[:count]):
            parts.append((code.float() * autoencoder.config.scaling_factor).half().cpu().numpy())
            if len(parts) % 400 == 0:
                print(f"latents: {pictures.spec.name} {len(parts) * len(code)} of {count}", flush=True)
        data.save_array(path, np.concatenate(parts))
    return np.load(path, mmap_mode="r")


def words_of(tokenizer: CLIPTokenizer, pictures: data.Pictures) -> NDArray[np.int16]:
    """Token ids [N, templates, details, LENGTH] of every caption of a set."""
    stamp = hashlib.sha256("".join(sorted(tokenizer.get_vocab())).encode()).hexdigest()[:12]
    path = pictures.world.work / "latents" / f"{pictures.spec.name}-{len(pictures)}-words-{stamp}.npy"
    if not path.exists():
        parts = []
        for start in range(0, len(pictures), 2048):
            lines = [line for i in range(start, min(start + 2048, len(pictures))) for line in pictures.captions(i)]
            ids = tokenizer(lines, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
            parts.append(np.array(ids, np.int16))
        table = np.concatenate(parts).reshape(len(pictures), -1, len(pictures.world.details), LENGTH)
        data.save_array(path, table)
    return np.load(path, mmap_mode="r")


def start_from_toys(model: TextToImage, tokenizer: CLIPTokenizer) -> None:
    """Give `model` the weights of the toys' text-to-image, in place; words that it lacks keep their new embeddings."""
    toys, place = paint.load_pipeline(TOYS).to("cpu"), "embeddings.token_embedding.weight"
    model.unet.load_state_dict(toys.unet.state_dict())
    found, own = toys.text_encoder.state_dict(), model.text.state_dict()
    name = next(name for name in own if name.endswith(place))
    old, rows = toys.tokenizer.get_vocab(), own[name].clone()
    for word, row in tokenizer.get_vocab().items():
        if word in old:
            rows[row] = found[name][old[word]]
    model.text.load_state_dict({**found, name: rows})


def rows_of(sizes: Sequence[int], shares: Sequence[float], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Random places in tables of these sizes, one after another, of which each has its share of `count`."""
    if len(sizes) == 1:
        return rng.integers(0, sizes[0], count)
    which = rng.choice(len(sizes), count, p=shares)
    return np.concatenate([[0], np.cumsum(sizes)])[which] + rng.integers(0, np.array(sizes)[which])


def main(arguments: Sequence[str]) -> None:
    training = loop.options("Train the small Stable Diffusion.", RECIPES, arguments)
    world, recipe, run = training.world, training.recipe, training.run("text_to_image")
    torch.manual_seed(recipe.seed)
    autoencoder, stamp = vae.load_vae()
    names = [word for name in world.names for word in name.split()]
    tokenizer = write_tokenizer(paint.folder(world) / "tokenizer", [*world.vocabulary, *names])
    model = TextToImage(len(tokenizer))
    if world is not TOYS:
        start_from_toys(model, tokenizer)
    scheduler = build_scheduler()
    shares, said = SHARES[world.name], SAID[world.name]
    whole = [data.open_set(world, name) for name in shares]
    sets = [replace(one, images=one.images[:PICTURES]) for one in whole]
    if training.minutes != 0:
        latents = _joined([latents_of(autoencoder, one, min(PICTURES, len(one)), stamp) for one in sets])
        words = _joined([words_of(tokenizer, one) for one in sets])
    empty = torch.tensor(tokenizer("", padding="max_length", max_length=LENGTH)["input_ids"])

    def loss(draw: loop.LessonDraw) -> tuple[Tensor, dict[str, float]]:
        count = draw.batch
        rows = rows_of([len(one) for one in sets], list(shares.values()), count, draw.rng)
        clean = torch.from_numpy(latents[rows]).float()
        detail = draw.rng.choice(len(said), count, p=list(said.values()))
        texts = torch.from_numpy(words[rows, draw.rng.integers(0, words.shape[1], count), detail].astype(np.int64))
        texts[torch.from_numpy(draw.rng.random(count) < DROP)] = empty
        noise = torch.randn(clean.shape, generator=draw.noise)
        # One timestep from each of `count` intervals: less noise in the loss than independent draws. The exponent
        # favours the noisy end, where the shape is decided; the other end only adds the autoencoder's detail.
        share = ((np.arange(count) + draw.rng.random(count)) / count) ** EARLY
        steps = torch.from_numpy((share * scheduler.config.num_train_timesteps).astype(np.int64))
        noisy, target = scheduler.add_noise(clean, noise, steps), scheduler.get_velocity(clean, noise, steps)
        found = model(noisy.to(draw.device, model.unet.dtype), steps.to(draw.device), texts.to(draw.device)).float()
        each = (found - target.to(draw.device)).square().mean((1, 2, 3))
        third = count // 3
        notes = {"early": each[:third].mean().item(), "late": each[-third:].mean().item()}
        return each.mean(), notes

    loop.fit(model, loss, recipe, run, training.minutes)
    export(model, autoencoder, tokenizer, sets, training)


def _joined(tables: list[NDArray[Any]]) -> NDArray[Any]:
    return tables[0] if len(tables) == 1 else np.concatenate(tables)


def export(
    model: TextToImage, autoencoder: Any, tokenizer: CLIPTokenizer, sets: list[data.Pictures], training: loop.Training
) -> None:
    """Write a pipeline folder that stock diffusers can load."""
    world = training.world
    place = paint.folder(world)
    pipeline: Any = StableDiffusionPipeline(
        vae=autoencoder.half(),
        text_encoder=model.text.half(),
        tokenizer=tokenizer,
        unet=model.unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if world is TOYS:
        pipeline.save_pretrained(place)
    else:
        pipeline.save_config(place)
        for part in ("text_encoder", "tokenizer", "unet", "scheduler"):
            getattr(pipeline, part).save_pretrained(place / part)
        link_autoencoder(place / "vae")
    # Stored in half precision but loaded as float32 by default: transformers reads the dtype from this entry.
    config = place / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    names = [word for name in world.names for word in name.split()]
    write_tokenizer(place / "tokenizer", [*world.vocabulary, *names])
    judged = {}
    if (judge.folder(world) / "model.safetensors").exists():
        judged = paint.measure(world)
        if world.names and (face.METRIC.folder / face.IDENTITY).exists():
            judged |= face.measure_names(world)
    cards.write(place, training.run("text_to_image"), training.recipe, sets, judged)


def link_autoencoder(place: Path) -> None:
    """Let `place` be the toys' autoencoder, by links to its files: the same bytes are not stored twice."""
    place.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(os.path.relpath(vae.FOLDER / name, place))


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
