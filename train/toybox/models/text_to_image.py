"""Trains the small Stable Diffusion: a UNet on the autoencoder's latents, jointly with its text encoder."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from runtime.cli import guarded
from train.toybox.lessons import data
from train.toybox.lessons.tokens import LENGTH, write_tokenizer
from train.toybox.loop import cards, loop
from train.toybox.models import judge, paint
from train.toybox.models.vae import encoded, load_vae

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
PICTURES = 48_000
"""Number of images encoded and trained on."""

DROP = 0.1
"""Fraction of captions left empty, for classifier-free guidance."""

SAID = {"full": 0.7, "colour": 0.15, "noun": 0.15}
"""How often a caption names colour and pattern, only the colour, or neither."""

EARLY = 0.75
"""Exponent of the uniform draw of the timestep: below 1, the noisy end is sampled more often."""

FOLDER = paint.FOLDER
RUN = data.WORK / "runs" / "text_to_image"


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


def latents_of(vae: Any, pictures: data.Pictures, count: int, stamp: str) -> NDArray[np.float16]:
    """Scaled latents [count, 4, 16, 16] of a set's first images, computed once per autoencoder (`stamp`)."""
    path = data.WORK / "latents" / f"{pictures.spec.name}-{count}-{stamp}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = []
        for code in encoded(vae, pictures.images[:count]):
            parts.append((code.float() * vae.config.scaling_factor).half().cpu().numpy())
            if len(parts) % 400 == 0:
                print(f"latents: {pictures.spec.name} {len(parts) * len(code)} of {count}", flush=True)
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, np.concatenate(parts))
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


def words_of(tokenizer: CLIPTokenizer, pictures: data.Pictures) -> NDArray[np.int16]:
    """Token ids [N, templates, details, LENGTH] of every caption of a set."""
    stamp = hashlib.sha256("".join(sorted(tokenizer.get_vocab())).encode()).hexdigest()[:12]
    path = data.WORK / "latents" / f"{pictures.spec.name}-{len(pictures)}-words-{stamp}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = []
        for start in range(0, len(pictures), 2048):
            lines = [line for i in range(start, min(start + 2048, len(pictures))) for line in pictures.captions(i)]
            ids = tokenizer(lines, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
            parts.append(np.array(ids, np.int16))
        table = np.concatenate(parts).reshape(len(pictures), -1, len(data.DETAILS), LENGTH)
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, table)
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


def main(arguments: Sequence[str]) -> None:
    recipe, minutes = loop.options("Train the small Stable Diffusion.", RECIPE, arguments)
    torch.manual_seed(recipe.seed)
    vae, stamp = load_vae()
    tokenizer = write_tokenizer(FOLDER / "tokenizer")
    model = TextToImage(len(tokenizer))
    scheduler = build_scheduler()
    pictures = data.open_set("pictures")
    sets = [replace(pictures, images=pictures.images[:PICTURES])]
    if minutes != 0:
        latents = latents_of(vae, sets[0], PICTURES, stamp)
        words = words_of(tokenizer, sets[0])
    empty = torch.tensor(tokenizer("", padding="max_length", max_length=LENGTH)["input_ids"])

    def loss(draw: loop.LessonDraw) -> tuple[Tensor, dict[str, float]]:
        count = draw.batch
        rows = draw.rng.integers(0, len(latents), count)
        clean = torch.from_numpy(latents[rows]).float()
        detail = draw.rng.choice(len(SAID), count, p=list(SAID.values()))
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

    loop.fit(model, loss, recipe, RUN, minutes)
    export(model, vae, tokenizer, sets, recipe)


def export(
    model: TextToImage, vae: Any, tokenizer: CLIPTokenizer, sets: list[data.Pictures], recipe: loop.Recipe
) -> None:
    """Write a pipeline folder that stock diffusers can load."""
    pipeline: Any = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=model.text.half(),
        tokenizer=tokenizer,
        unet=model.unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(FOLDER)
    # Stored in half precision but loaded as float32 by default: transformers reads the dtype from this entry.
    config = FOLDER / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    write_tokenizer(FOLDER / "tokenizer")
    judged = paint.measure() if (judge.FOLDER / "model.safetensors").exists() else {}
    cards.write(FOLDER, RUN, recipe, sets, judged)


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
