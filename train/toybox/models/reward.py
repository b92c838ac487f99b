"""Trains the small ImageReward: does an image match its caption?

ImageReward learns from pairs ranked by people. Here the better caption is the image's own; the worse one differs in one
attribute that the caption names and the image shows.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import BertTokenizer

from model.backbones.reward import PIXEL_MEAN, PIXEL_STD, WEIGHTS, RewardConfig, RewardModel, save_config
from pipelines.toybox import world
from runtime.cli import guarded
from train.toybox.lessons import data
from train.toybox.lessons.augment import degrade, to_planes
from train.toybox.lessons.toys import TOYS
from train.toybox.loop import cards, loop
from train.toybox.models import vae
from train.toybox.models.dino import area_under_curve

RECIPE = loop.Recipe(
    steps=5000,
    batch=64,
    lr=5e-3,
    warmup=100,
    average=0.995,
    weight_decay=0.05,
    precision="bfloat16",
    muon=True,
    seed=81,
)
READ, WRONG = 2, 4
"""One image in READ is scored with captions, as the heads alone cost half as much and vision is harder to learn than
text; and each of those has WRONG wrong captions."""

SAID = {"full": 0.8, "colour": 0.1, "noun": 0.1}
"""How often a caption names colour and pattern, only the colour, or neither."""

LENGTH = 32
"""Tokens per caption, including start and end; the toybox's longest has 25."""

PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
FOLDER = TOYS.weights / "reward"

SUBJECT = world.Toy("ball", (0.5,) * 4, ("red",) * 3, ((0.0,) * 3,) * 3, "plain", 0.5, 0.0)
"""A placeholder: captions name only family, colours and pattern, which `describe` fills in."""


def vocabulary() -> dict[str, int]:
    """BERT's special tokens, single characters to spell unknown words, and the words of the toybox's captions."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [word for word in world.VOCABULARY if word not in letters]
    entries = [PAD, UNKNOWN, START, END, MASK, *letters, *(f"##{c}" for c in letters), *words]
    return {entry: place for place, entry in enumerate(entries)}


def write_tokenizer(folder: Path) -> BertTokenizer:
    """Write `vocab.txt` and the tokenizer's own files to `folder`; returns the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def spell(captions: Sequence[str], places: dict[str, int]) -> NDArray[np.int64]:
    """Token ids [N, longest], padded, as the tokenizer would return for captions made of the toybox's words."""
    rows = [[START, *caption.replace(",", " ,").split(), END] for caption in captions]
    ids = np.full((len(rows), max(map(len, rows))), places[PAD], np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = [places[token] for token in tokens]
    return ids


def describe(row: Sequence[int], variant: int, detail: str) -> str:
    """The caption of an image with the values `row` of `TOYS.attributes`."""
    name = {column: values[at] for (column, values), at in zip(TOYS.attributes.items(), row, strict=True)}
    colours = (name["colour"], name["second"], name["colour"])
    subject = replace(SUBJECT, family=name["family"], colours=colours, pattern=name["pattern"])
    shape = None if name["shape"] == "own" else name["shape"]
    look = world.Look(name["scene"], name["style"], shape, None if name["dress"] == "none" else name["dress"])
    return world.caption(subject, look, variant=variant, detail=cast(world.Detail, detail))


def wrong(
    row: Sequence[int], shown: Sequence[bool], variant: int, detail: str, rng: np.random.Generator, count: int
) -> dict[str, str]:
    """Captions that differ from the image's own in one attribute, by attribute name; at most `count`.

    shown: which values of `row` are visible, as in `World.visible`. Attributes the caption does not name cannot differ.
    """
    own = describe(row, variant, detail)
    names = list(TOYS.attributes)
    family, shape = names.index("family"), names.index("shape")
    found: dict[str, str] = {}
    for column in rng.permutation(np.flatnonzero(shown)).tolist():
        changed, values = list(row), len(TOYS.attributes[names[column]])
        changed[column] = (changed[column] + int(rng.integers(1, values))) % values
        if TOYS.attributes["shape"][changed[shape]] == TOYS.attributes["family"][changed[family]]:
            continue  # a ball shaped ball is still a ball
        other = describe(changed, variant, detail)
        if other != own:
            found[names[column]] = other
        if len(found) == count:
            break
    return found


def sizes(words: int, mean: float = 0.0, std: float = 1.0) -> RewardConfig:
    """ImageReward's architecture, at a size that fits the repository."""
    return RewardConfig(
        image_size=data.SIZE,
        patch_size=8,
        vision_layers=5,
        vision_width=128,
        vision_heads=4,
        vision_mlp=384,
        vocabulary=words,
        text_layers=3,
        text_width=128,
        text_heads=4,
        text_mlp=384,
        positions=LENGTH,
        length=LENGTH,
        head=(256, 64, 32, 16),
        dropout=(),
        mean=mean,
        std=std,
    )


class RewardInTraining(nn.Module):
    """The reward model with training-only linear heads that classify the attributes."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__()
        self.reward = RewardModel(config)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(2 * config.vision_width, len(values)) for name, values in TOYS.attributes.items()}
        )


def rank(model: RewardModel, tokens: Tensor, words: Tensor) -> Tensor:
    """Rewards [B, K], float32, of K captions per image: a faster `RewardModel.forward`.

    tokens: [B, N, d] from `encode_image`; words: token ids [B, K, L], padded. An image's captions cross-attend to it as
    one sequence, so its tokens are projected once instead of K times, and the last layer computes only first tokens.
    """
    count, captions, _ = words.shape
    layers = model.text.encoder.layer
    states = model.text.embeddings(words.flatten(0, 1))
    bias = torch.zeros(states.shape[:2], dtype=states.dtype, device=states.device)
    bias = bias.masked_fill(words.flatten(0, 1) == 0, -1e4)[:, None, None]
    for layer in layers:
        states = layer.attention(states, attention_mask=bias)[0]
        states = states[:, :1] if layer is layers[-1] else states
        seen = layer.crossattention(states.reshape(count, -1, states.shape[-1]), encoder_hidden_states=tokens)[0]
        states = layer.feed_forward_chunk(seen).reshape(states.shape)
    return model.reward(states[:, 0]).view(count, captions)


def normalised(planes: Tensor) -> Tensor:
    """Pixels in 0..255 [B, 3, H, W], normalised for the model."""
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (PIXEL_MEAN, PIXEL_STD))
    return (planes - mean) / std


def main(words: Sequence[str]) -> None:
    training = loop.options("Train the small ImageReward.", {TOYS.name: RECIPE}, words)
    recipe = training.recipe
    torch.manual_seed(recipe.seed)
    places = vocabulary()
    model, pictures = RewardInTraining(sizes(len(places))), data.open_set(TOYS, "pictures")
    sets = [pictures, data.open_set(TOYS, "views"), vae.decoded(pictures)]

    def loss(draw: loop.LessonDraw) -> tuple[Tensor, dict[str, float]]:
        images, _, attributes = data.batch(sets, draw.batch, draw.rng)
        shown = TOYS.visible(attributes)
        # A stride, not the first ones: a batch is ordered by set and row.
        words = torch.from_numpy(texts(attributes[::READ], shown[::READ], places, draw.rng)).to(draw.device)
        pixels = normalised(degrade(torch.from_numpy(images), draw.rng, 0.3)).to(draw.device, draw.dtype)
        tokens = model.reward.encode_image(pixels)
        rewards = rank(model.reward, tokens[::READ], words)
        own, other = rewards[:, :1], rewards[:, 1:]
        pairs = -F.logsigmoid(own - other).mean()
        # The same loss across images: a reward must also tell which of two images matches its caption better.
        across = -F.logsigmoid(own[:, :, None] - other[None]).mean()
        truth = torch.from_numpy(np.where(shown, attributes, -100).astype(np.int64)).to(draw.device)
        pooled = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
        named = [
            F.cross_entropy(head(pooled).float(), truth[:, column]) for column, head in enumerate(model.heads.values())
        ]
        notes = {f"named_{name}": value.item() for name, value in zip(model.heads, named, strict=True)}
        right = (own > other).float().mean().item()
        return pairs + across + torch.stack(named).sum() / 4, {"pairs": pairs.item(), "right": right, **notes}

    loop.fit(model, loss, recipe, training.run("reward"), training.minutes)
    export(model.reward, sets, training)


def texts(
    attributes: NDArray[np.int16], shown: NDArray[np.bool_], places: dict[str, int], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Token ids [B, 1 + WRONG, L] of each image's own caption and of wrong ones."""
    captions: list[str] = []
    details = rng.choice(list(SAID), len(attributes), p=list(SAID.values())).tolist()
    variants = rng.integers(len(world.TEMPLATES), size=len(attributes)).tolist()
    for row, seen, variant, detail in zip(attributes.tolist(), shown.tolist(), variants, details, strict=True):
        others = list(wrong(row, seen, variant, detail, rng, WRONG).values())
        captions += [describe(row, variant, detail), *(others * WRONG)[:WRONG]]
    return spell(captions, places).reshape(len(attributes), 1 + WRONG, -1)


def export(model: RewardModel, sets: list[data.Pictures], training: loop.Training) -> None:
    """Write the folder that `model.backbones.reward.load_reward` loads."""
    places = vocabulary()
    shown = TOYS.visible(np.asarray(sets[0].attributes[:512]))
    own, other = (torch.cat(part) for part in zip(*compared(model, sets[0], shown), strict=True))
    spread = torch.cat([own.flatten(), other.flatten()])
    spread = spread[spread.isfinite()]
    config = sizes(len(places), round(spread.mean().item(), 4), round(spread.std().item(), 4))
    write_tokenizer(FOLDER)
    save_config(config, FOLDER)
    cards.save_half(model.state_dict(), FOLDER / WEIGHTS)
    cards.write(FOLDER, training.run("reward"), training.recipe, sets, measure(model))


def compared(model: RewardModel, pictures: data.Pictures, shown: NDArray[np.bool_]) -> list[tuple[Tensor, Tensor]]:
    """Rewards of the images' own captions [B] and of these with each attribute changed [B, attributes], NaN where the
    caption does not name or the image does not show it, in batches.

    shown: bool [N, attributes], as from `World.visible` or `data.seen`, of the first N images, which are compared.
    """
    places, names = vocabulary(), list(TOYS.attributes)
    found = []
    for start in range(0, len(shown), 64):
        rows = np.arange(start, min(start + 64, len(shown)))
        attributes = np.asarray(pictures.attributes[rows])
        captions: list[str] = []
        named = torch.zeros(len(rows), len(names), dtype=torch.bool)
        for at, (row, there) in enumerate(zip(attributes.tolist(), shown[rows].tolist(), strict=True)):
            index = int(rows[at])
            variant = index % len(world.TEMPLATES)
            others = wrong(row, there, variant, "full", np.random.default_rng([index]), len(names))
            own = describe(row, variant, "full")
            captions += [own, *(others.get(name, own) for name in names)]
            named[at] = torch.tensor([name in others for name in names])
        words = torch.from_numpy(spell(captions, places)).view(len(rows), 1 + len(names), -1)
        with torch.no_grad():
            tokens = model.encode_image(normalised(to_planes(torch.tensor(pictures.images[rows]))))
            rewards = rank(model, tokens, words)
        found.append((rewards[:, 0], rewards[:, 1:].masked_fill(~named, torch.nan)))
    return found


def measure(model: RewardModel) -> dict[str, float]:
    """On held-out subjects: how often an image's own caption outscores the same with one attribute changed (`prefers`;
    also per attribute), and how often a matching image-caption pair outscores a mismatched one (`across`, the area
    under the curve over all images)."""
    held = data.open_set(TOYS, "pictures-test")
    own, other = (torch.cat(part) for part in zip(*compared(model, held, data.seen(held)), strict=True))
    named = other.isfinite()
    better = own[:, None] > other
    figures = {"prefers": better[named].float().mean().item(), "across": area_under_curve(own, other[named])}
    for column, name in enumerate(TOYS.attributes):
        figures[name] = better[:, column][named[:, column]].float().mean().item()
    return {name: round(value, 4) for name, value in figures.items()}


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
