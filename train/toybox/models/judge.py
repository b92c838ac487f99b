"""Trains a small model that predicts an image's attributes and the subject's mask, to judge text-to-image's images and
the detector's boxes.

It learns from all attribute combinations, including those of held-out subjects: a judge mistakes an unseen combination
for another.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from runtime.cli import guarded
from runtime.errors import UserError
from train.toybox.lessons import data
from train.toybox.lessons.augment import degrade, to_planes
from train.toybox.lessons.boxes import boxes_of, iou
from train.toybox.lessons.registry import FACES, TOYS, world_option
from train.toybox.lessons.worlds import World
from train.toybox.loop import cards, loop

RECIPE = loop.Recipe(
    steps=9000,
    batch=64,
    lr=2e-3,
    warmup=100,
    average=0.995,
    weight_decay=0.05,
    precision="bfloat16",
    muon=True,
    seed=91,
)
# A third of the images, and of the attributes only two (skin, iris) finer than a toy's.
RECIPES = {TOYS.name: RECIPE, FACES.name: replace(RECIPE, steps=3000)}
SETS = {TOYS.name: ("judged", "pictures"), FACES.name: ("judged", "pictures", "celebrities", "views")}
WIDTHS = {TOYS.name: (32, 64, 112, 160), FACES.name: (24, 48, 96, 144)}
"""Channels of the stages; fewer for faces, as the weights of both worlds stay below 80 MB together."""


def folder(world: World) -> Path:
    """Where the judge is."""
    return world.weights / "judge"


class Block(nn.Module):
    """A strided convolution, then a residual convolution."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(before, width, 4, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, width)
        self.turn = nn.Conv2d(width, width, 3, padding=1)
        self.turn_norm = nn.GroupNorm(4, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.down(x)))
        return x + F.silu(self.turn_norm(self.turn(x)))


class Judge(nn.Module):
    """Four strided stages, one linear head per attribute, and a mask decoder on the feature maps of all stages."""

    def __init__(self, world: World) -> None:
        super().__init__()
        widths = WIDTHS[world.name]
        self.stages = nn.ModuleList(
            Block(before, width) for before, width in zip((3, *widths[:-1]), widths, strict=True)
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(widths[-1] * 5, len(values)) for name, values in world.attributes.items()}
        )
        self.up = nn.ModuleList(nn.Conv2d(deep, fine, 1) for fine, deep in itertools.pairwise(widths))
        self.mask = nn.Sequential(nn.Conv2d(widths[0], 4 * 8, 3, padding=1), nn.PixelShuffle(2), nn.SiLU())
        self.outline = nn.Conv2d(8 + 3, 1, 3, padding=1)

    def forward(self, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits [B, values] of every attribute and of the subject's mask [B, H, W]; pixels [B, 3, H, W] in -1..1."""
        maps, x = [], pixels
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        # The subject is in the middle, the scene around it: mean pooling alone would mix them.
        pooled = torch.cat([x.mean((2, 3)), F.adaptive_max_pool2d(x, 2).flatten(1)], 1)
        for up, fine in zip(reversed(self.up), reversed(maps[:-1]), strict=True):
            x = F.silu(fine + F.interpolate(up(x), scale_factor=2.0))
        mask = self.outline(torch.cat([self.mask(x), pixels], 1))[:, 0]
        return {name: head(pooled) for name, head in self.heads.items()}, mask


def load_judge(world: World) -> Judge:
    """The trained judge of a world; raises UserError if there is none."""
    path = folder(world) / "model.safetensors"
    if not path.exists():
        command = f"python -m train.toybox.models.judge{world_option(world)}"
        raise UserError(f"{path} is missing; train it with `{command}`")
    judge = Judge(world)
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval()


@torch.no_grad()
def verdicts(judge: Judge, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Most likely value of every attribute, [B] each, and the subject's mask, bool [B, 64, 64].

    The logits of each image and its mirror image are added. images: uint8 [B, 64, 64, 3].
    """
    named: dict[str, list[Tensor]] = {name: [] for name in judge.heads}
    masks = []
    for part in images.split(64):
        pixels = to_planes(part) / 127.5 - 1
        (answers, mask), (mirrored, mask_mirrored) = judge(pixels), judge(pixels.flip(3))
        for name, found in named.items():
            found.append((answers[name] + mirrored[name]).argmax(1))
        masks.append(mask + mask_mirrored.flip(2) > 0)
    return {name: torch.cat(found) for name, found in named.items()}, torch.cat(masks)


def main(words: Sequence[str]) -> None:
    training = loop.options("Train the judge of text-to-image.", RECIPES, words)
    world, recipe, run = training.world, training.recipe, training.run("judge")
    torch.manual_seed(recipe.seed)
    judge, sets = Judge(world), [data.open_set(world, name) for name in SETS[world.name]]

    def loss(draw: loop.LessonDraw) -> tuple[Tensor, dict[str, float]]:
        images, regions, attributes = data.batch(sets, draw.batch, draw.rng)
        pixels = (degrade(torch.from_numpy(images), draw.rng, 0.3) / 127.5 - 1).to(draw.device, draw.dtype)
        seen = np.where(world.visible(attributes), attributes, -100)  # invisible attributes are ignored
        truth = torch.from_numpy(seen.astype(np.int64)).to(draw.device)
        answers, mask = judge(pixels)
        losses = [F.cross_entropy(answer.float(), truth[:, i]) for i, answer in enumerate(answers.values())]
        subject = torch.from_numpy(regions == data.SUBJECT).float().to(draw.device)
        outline = F.binary_cross_entropy_with_logits(mask.float(), subject)
        notes = {name: v.item() for name, v in zip(answers, losses, strict=True)}
        return torch.stack(losses).sum() / 4 + outline, {**notes, "mask": outline.item()}

    loop.fit(judge, loss, recipe, run, training.minutes)
    cards.save_half(judge.state_dict(), folder(world) / "model.safetensors")
    cards.write(folder(world), run, recipe, sets, measure(world, judge))


def measure(world: World, judge: Judge) -> dict[str, float]:
    """On held-out subjects: accuracy per attribute over the images that show it (the ceiling of a perfect generator),
    and the fraction of mask boxes with IoU >= 0.8; of toys also the fraction of hidden patterns (`data.seen`), and the
    pattern accuracy including those."""
    held = data.open_set(world, "pictures-test")
    found, mask = verdicts(judge, torch.tensor(held.images))
    shown = data.seen(held)
    share = {
        name: float((answer.numpy() == held.column(name))[shown[:, i]].mean())
        for i, (name, answer) in enumerate(found.items())
    }
    if "pattern" in found:
        pattern = list(found).index("pattern")
        named = world.visible(np.asarray(held.attributes))[:, pattern]
        share["pattern_hidden_too"] = float((found["pattern"].numpy() == held.column("pattern"))[named].mean())
        share["pattern_hidden"] = 1 - float(shown[named, pattern].mean())
    truth = boxes_of(np.asarray(held.regions) == data.SUBJECT)
    share["box"] = float((iou(boxes_of(mask.numpy()), truth) >= 0.8).mean())
    return {name: round(value, 4) for name, value in share.items()}


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
