"""Trains a small classifier that reads the attributes off a picture: the judge of what text-to-image paints."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from params import UserError, cli
from train.toybox import cards, data, loop
from train.toybox.augment import degrade, to_planes

RECIPE = loop.Recipe(
    steps=1600, lr=2e-3, warmup=80, average=0.99, weight_decay=0.05, precision="bfloat16", muon=True, seed=91
)
BATCH = 64
FOLDER = Path("weights/toybox/judge")
RUN = data.WORK / "runs" / "judge"


class Judge(nn.Module):
    """Four strided stages of two convolutions, one linear head for each attribute."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 80, 112)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths[:-1]), widths, strict=True):
            layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(widths[-1] * 5, len(values)) for name, values in data.ATTRIBUTES.items()}
        )

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Logits [B, values] of every attribute for pixels [B, 3, 64, 64] in -1..1."""
        features = self.trunk(pixels)
        # The subject stands in the middle, the scene around it: the mean alone would mix them.
        pooled = torch.cat([features.mean((2, 3)), F.adaptive_max_pool2d(features, 2).flatten(1)], 1)
        return {name: head(pooled) for name, head in self.heads.items()}


def load_judge() -> Judge:
    """The trained judge; raises UserError where there is none."""
    path = FOLDER / "model.safetensors"
    if not path.exists():
        raise UserError(f"{path} is missing; train it with `python -m train.toybox.judge`")
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval()


@torch.no_grad()
def verdicts(judge: Judge, images: Tensor) -> dict[str, Tensor]:
    """The most likely value of every attribute, [B] each, for images uint8 [B, 64, 64, 3]."""
    parts = [judge(to_planes(part) / 127.5 - 1) for part in images.split(64)]
    return {name: torch.cat([part[name].argmax(1) for part in parts]) for name in data.ATTRIBUTES}


def main() -> None:
    recipe, minutes = loop.options("Train the judge of text-to-image.", RECIPE)
    torch.manual_seed(recipe.seed)
    judge, sets = Judge(), [data.open_set("pictures"), data.open_set("views")]

    def loss(draw: loop.Draw) -> tuple[Tensor, dict[str, float]]:
        images, _, attributes = data.batch(sets, BATCH, draw.rng)
        pixels = (degrade(torch.from_numpy(images), draw.rng, 0.3) / 127.5 - 1).to(draw.device, torch.bfloat16)
        truth = torch.from_numpy(attributes.astype(np.int64)).to(draw.device)
        answers = judge(pixels)
        losses = [F.cross_entropy(answer.float(), truth[:, i]) for i, answer in enumerate(answers.values())]
        return torch.stack(losses).mean(), {name: v.item() for name, v in zip(answers, losses, strict=True)}

    loop.fit(judge, loss, recipe, RUN, minutes)
    cards.save_half(judge.state_dict(), FOLDER / "model.safetensors")
    cards.write(FOLDER, RUN, recipe, BATCH, sets, measure(judge))


def measure(judge: Judge) -> dict[str, float]:
    """Share of right verdicts on bare photos of held-out subjects: what a perfect painter would reach."""
    held = data.open_set("pictures-test")
    bare = np.flatnonzero(np.all([held.column(name) == 0 for name in ("style", "dress", "shape")], axis=0))
    found = verdicts(judge, torch.tensor(held.images[bare]))
    return {name: round(float((answer.numpy() == held.column(name)[bare]).mean()), 4) for name, answer in found.items()}


if __name__ == "__main__":
    cli(main)
