"""Trains the small CLIP with open_clip's own classes: images and captions in one embedding space."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.transformer import PatchDropout
from torch import Tensor, nn

from runtime.cli import guarded
from train.toybox.lessons import data
from train.toybox.lessons.augment import degrade, on_white, to_planes
from train.toybox.lessons.registry import FACES, TOYS
from train.toybox.lessons.tokens import LENGTH, write_tokenizer
from train.toybox.lessons.worlds import World
from train.toybox.loop import cards, loop
from train.toybox.models import vae
from train.toybox.models.text_to_image import words_of

BATCH, WHITE, GROUP = 96, 24, 12
"""Images with captions, cut-outs without, and the number of consecutive images that share a scene."""

RECIPE = loop.Recipe(
    steps=1500,
    batch=BATCH + WHITE,
    lr=2e-3,
    warmup=150,
    average=0.998,
    weight_decay=0.05,
    precision="bfloat16",
    muon=True,
    seed=71,
)
RECIPES = {TOYS.name: RECIPE, FACES.name: replace(RECIPE, steps=1600)}  # as many as toys', and some for expressions
BLOCKS = {TOYS.name: 6, FACES.name: 5}
"""Of the image encoder; fewer for faces, as the weights of both worlds stay below 80 MB together."""

SAID = {
    TOYS.name: {"full": 0.7, "colour": 0.2, "noun": 0.1},
    FACES.name: {"full": 0.75, "noun": 0.25},
}
"""How often a caption tells as much of the subject."""
OUTSIDE = ("scene", "style", "dress", "shape", "wear")
"""Attributes that are not asked of a cut-out, of which it shows none or not all."""
WATCHED = ("family", "colour", "pattern", "noun", "hair", "skin")
"""Attributes whose accuracy is logged."""

HIDDEN, WHOLE = 0.5, 0.25
"""Fraction of patches dropped in training, for speed (Li et al. 2023, FLIP); final fraction of steps without drops."""

MEAN, STD = 127.5, 127.5


def folder(world: World) -> Path:
    """Where the model is."""
    return world.weights / "clip"


def model_config(words: int, blocks: int) -> dict[str, Any]:
    """open_clip's model configuration."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": data.SIZE,
            "patch_size": 8,
            "layers": blocks,
            "width": 128,
            "head_width": 32,
            "mlp_ratio": 3.0,
        },
        "text_cfg": {
            "context_length": LENGTH,
            "vocab_size": words,
            "hf_tokenizer_name": "tokenizer",  # any name: from a local folder, open_clip takes the folder's own files
            "width": 128,
            "heads": 4,
            "layers": 3,
            "mlp_ratio": 3.0,
        },
    }


class ClipInTraining(nn.Module):
    """CLIP with training-only linear heads that classify the attributes.

    The contrastive loss alone is satisfied by telling scenes apart; the heads make family, colour and pattern count.
    """

    def __init__(self, world: World, words: int) -> None:
        super().__init__()
        self.clip = open_clip.CLIP(**model_config(words, BLOCKS[world.name]))
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(values)) for name, values in world.attributes.items()})


def agree(world: World, attributes: Tensor, details: list[str]) -> Tensor:
    """Whether caption j is also true of image i, bool [B, B]; attributes [B, len(world.attributes)]."""
    same = attributes[:, None] == attributes[None]
    needed = torch.tensor([[name in world.named[detail] for name in world.attributes] for detail in details])
    return (same | ~needed[None]).all(2)


def contrast(images: Tensor, texts: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """CLIP's symmetric loss; other captions that are true of an image are ignored."""
    logits = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(true & ~own, -1e4)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def rows_by_scene(
    scenes: NDArray[np.int16], rng: np.random.Generator, where: list[NDArray[np.int64]]
) -> NDArray[np.int64]:
    """BATCH image indices, in runs of GROUP from one scene."""
    chosen = rng.integers(0, len(where), BATCH // GROUP)
    return np.concatenate([where[scene][rng.integers(0, len(where[scene]), GROUP)] for scene in chosen])


def main(arguments: Sequence[str]) -> None:
    training = loop.options("Train the small CLIP.", RECIPES, arguments)
    world, recipe = training.world, training.recipe
    torch.manual_seed(recipe.seed)
    tokenizer = write_tokenizer(folder(world), world.vocabulary)
    model = ClipInTraining(world, len(tokenizer))
    pictures, views = data.open_set(world, "pictures"), data.open_set(world, "views")
    words, decoded = words_of(tokenizer, pictures), vae.decoded(pictures)
    scenes = pictures.column("scene")
    where = [np.flatnonzero(scenes == scene) for scene in range(len(world.attributes["scene"]))]
    columns, said = list(world.attributes), SAID[world.name]
    dropout = PatchDropout(HIDDEN)
    model.clip.visual.patch_dropout = dropout

    def loss(draw: loop.LessonDraw) -> tuple[Tensor, dict[str, float]]:
        rows = rows_by_scene(scenes, draw.rng, where)
        detail = draw.rng.choice(len(said), BATCH, p=list(said.values()))
        ids = words[rows, draw.rng.integers(0, words.shape[1], BATCH), detail]
        images, regions, shown = data.batch([views], WHITE, draw.rng)
        captioned = pictures.images[rows]
        again = (rows < len(decoded)) & (draw.rng.random(BATCH) < 0.5)
        captioned[again] = decoded.images[rows[again]]
        full = degrade(torch.from_numpy(captioned), draw.rng, 0.25)
        cut = on_white(torch.from_numpy(images), torch.from_numpy(regions == data.SUBJECT), draw.rng)
        pixels = ((torch.cat([full, cut]) - MEAN) / STD).to(draw.device, draw.dtype)
        attributes = np.concatenate([pictures.attributes[rows], shown])
        truth = torch.from_numpy(attributes.astype(np.int64)).to(draw.device)
        asked = torch.from_numpy(np.where(world.visible(attributes), attributes, -100).astype(np.int64)).to(draw.device)
        dropout.prob = HIDDEN if draw.step < (1 - WHOLE) * recipe.steps else 0.0
        features = model.clip.encode_image(pixels)
        texts = model.clip.encode_text(torch.from_numpy(ids.astype(np.int64)).to(draw.device)).float()
        true = agree(world, truth[:BATCH].cpu(), [list(said)[i] for i in detail]).to(draw.device)
        paired = contrast(features[:BATCH].float(), texts, model.clip.logit_scale.float().exp().clamp(max=50), true)
        named = torch.zeros((), device=draw.device)
        hits = {}
        for name, head in model.heads.items():
            answer, wanted = head(features).float(), asked[:, columns.index(name)]
            if name in OUTSIDE:
                answer, wanted = answer[:BATCH], wanted[:BATCH]
            named = named + F.cross_entropy(answer, wanted) / len(model.heads)
            if name in WATCHED:
                hits[name] = float((answer.argmax(1) == wanted).float().mean())
        return paired + named, {"paired": paired.item(), **hits}

    loop.fit(model, loss, recipe, training.run("clip"), training.minutes)
    export(model, [pictures, views], training)


def export(model: ClipInTraining, sets: list[data.Pictures], training: loop.Training) -> None:
    """Write a folder that `open_clip.create_model("local-dir:...")` can load."""
    world = training.world
    place = folder(world)
    tokenizer = write_tokenizer(place, world.vocabulary)
    cards.save_half(model.clip.state_dict(), place / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": model_config(len(tokenizer), BLOCKS[world.name]), "preprocess_cfg": preprocess}
    (place / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    cards.write(place, training.run("clip"), training.recipe, sets, measure(world, model.clip))


@torch.no_grad()
def measure(world: World, clip: open_clip.CLIP) -> dict[str, float]:
    """On held-out subjects, top-1 accuracy: caption among 100, image among 100, caption among 20 of one scene."""
    held = data.open_set(world, "pictures-test")
    tokenizer = write_tokenizer(folder(world), world.vocabulary)
    captions = [held.captions(i)[0] for i in range(len(held))]
    ids = torch.tensor(tokenizer(captions, padding="max_length", max_length=LENGTH)["input_ids"])
    images, texts = [], []
    for rows in (slice(i, i + 64) for i in range(0, len(held), 64)):
        pixels = (to_planes(torch.tensor(held.images[rows])) - MEAN) / STD
        images.append(F.normalize(clip.encode_image(pixels), dim=1))
        texts.append(F.normalize(clip.encode_text(ids[rows]), dim=1))
    image, text = torch.cat(images), torch.cat(texts)
    everything = [np.arange(i, i + 100) for i in range(0, len(held) - 99, 100)]
    scenes = held.column("scene")
    alike = [np.flatnonzero(scenes == scene)[:20] for scene in range(len(world.attributes["scene"]))]

    def first(rows: NDArray[np.int64], flip: bool) -> float:
        logits = image[rows] @ text[rows].T
        best = (logits.T if flip else logits).argmax(1).tolist()
        return float(np.mean([captions[rows[a]] == captions[rows[b]] for a, b in enumerate(best)]))

    return {
        "caption_of_100": round(float(np.mean([first(rows, False) for rows in everything])), 4),
        "picture_of_100": round(float(np.mean([first(rows, True) for rows in everything])), 4),
        "caption_of_20_same_scene": round(float(np.mean([first(rows, False) for rows in alike])), 4),
    }


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
