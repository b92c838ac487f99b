"""Trains the small DINOv2 to tell individuals apart: views of one subject cluster, its look-alikes stay apart."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from runtime.cli import guarded
from train.toybox.lessons import data
from train.toybox.lessons.augment import degrade, on_white, to_planes
from train.toybox.lessons.toys import TOYS
from train.toybox.loop import cards, loop

SUBJECTS, SHOWN, FAMILIES = 36, 3, 3
"""Subjects per batch, images per subject (the last on white), and families the subjects come from."""

RECIPE = loop.Recipe(
    steps=450,
    batch=SUBJECTS * SHOWN,
    lr=2e-3,
    warmup=100,
    average=0.998,
    weight_decay=0.05,
    precision="bfloat16",
    muon=True,
    seed=81,
)

TEMPERATURE = 0.1
FOLDER = TOYS.weights / "dino"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPE: dict[str, Any] = {
    "image_size": data.SIZE,
    "patch_size": 8,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "mlp_ratio": 3,
    "layerscale_value": 0.3,
}
"""Of a `Dinov2Config`: 64 px, 8 px patches, six blocks of width 128."""


def build() -> Dinov2Model:
    """An untrained DINOv2."""
    return Dinov2Model(Dinov2Config(**SHAPE))


def save_processor(folder: Path) -> None:
    """Write the image processor of a network that reads `normalise`d images."""
    size = {"height": data.SIZE, "width": data.SIZE}
    BitImageProcessor(
        size=size, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD), do_convert_rgb=True
    ).save_pretrained(folder)


def normalise(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] in 0..255 to the image processor's range."""
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (MEAN, STD))
    return (pixels / 255 - mean) / std


def same_subject_loss(features: Tensor, subjects: Tensor) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, L_out) of features [B, d] with subject indices [B]."""
    unit = F.normalize(features, dim=1)
    logits = unit @ unit.T / TEMPERATURE
    itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(itself, -1e4)
    positive = (subjects[:, None] == subjects[None]) & ~itself
    log_probability = logits.log_softmax(1)
    return -(log_probability * positive).sum() / positive.sum()


def choose(families: NDArray[np.int16], rng: np.random.Generator) -> NDArray[np.int64]:
    """SUBJECTS distinct subjects, equally many from each of FAMILIES random families; families: array [subjects]."""
    kinds = rng.choice(len(TOYS.attributes["family"]), FAMILIES, replace=False)
    return np.concatenate(
        [rng.choice(np.flatnonzero(families == k), SUBJECTS // FAMILIES, replace=False) for k in kinds]
    )


def main(words: Sequence[str]) -> None:
    training = loop.options("Train the small DINOv2.", {TOYS.name: RECIPE}, words)
    recipe = training.recipe
    torch.manual_seed(recipe.seed)
    model, views = build(), data.open_set(TOYS, "views")
    families = views.column("family")[:: views.spec.views]

    def loss(draw: loop.LessonDraw) -> tuple[Tensor, dict[str, float]]:
        subjects = choose(families, draw.rng)
        shown = np.stack([draw.rng.permutation(views.spec.views)[:SHOWN] for _ in subjects], 1)
        rows = subjects[None] * views.spec.views + shown  # [SHOWN, SUBJECTS]
        images = torch.from_numpy(views.images[rows])
        masks = torch.from_numpy(views.regions[rows[-1]] == data.SUBJECT)
        full = degrade(images[:-1].flatten(0, 1), draw.rng, 0.4)
        cut = degrade(on_white(images[-1], masks, draw.rng).permute(0, 2, 3, 1), draw.rng, 0.4)
        pixels = normalise(torch.cat([full, cut])).to(draw.device, draw.dtype)
        features = model(pixels).last_hidden_state[:, 0].float()
        names = torch.from_numpy(np.tile(subjects, SHOWN)).to(draw.device)
        unit = F.normalize(features, dim=1)
        with torch.no_grad():
            near = (unit @ unit.T - 2 * torch.eye(len(unit), device=unit.device)).argmax(1)
            first = float((names[near] == names).float().mean())
        return same_subject_loss(features, names), {"first": first}

    loop.fit(model, loss, recipe, training.run("dino"), training.minutes)
    export(model, [views], training)


def export(model: Dinov2Model, sets: list[data.Pictures], training: loop.Training) -> None:
    """Write the transformers folder."""
    measured = measure(model)
    save_processor(FOLDER)
    model.half().save_pretrained(FOLDER)
    model.float()
    cards.write(FOLDER, training.run("dino"), training.recipe, sets, measured)


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """ROC-AUC: how often a positive scores above a negative, with ties counting half."""
    order = torch.cat([positive, negative]).argsort().argsort().double() + 1
    count = len(positive)
    return float((order[:count].sum() - count * (count + 1) / 2) / (count * len(negative)))


@torch.no_grad()
def measure(model: Dinov2Model) -> dict[str, float]:
    """ROC-AUC of cosines on held-out subjects, same subject against others of its family: cut-outs, whole images."""
    held = data.open_set(TOYS, "views-test")
    images, masks = torch.tensor(held.images), torch.tensor(held.regions) == data.SUBJECT
    subjects = torch.arange(len(held)) // held.spec.views
    families = torch.tensor(held.column("family").astype(np.int64))
    found = {}
    for name, pixels in (("auc_cut_out", on_white(images, masks, None)), ("auc_picture", to_planes(images))):
        unit = torch.cat(
            [F.normalize(model(normalise(part)).last_hidden_state[:, 0], dim=1) for part in pixels.split(64)]
        )
        cosine = unit @ unit.T
        pair = torch.ones(len(unit), len(unit)).triu(1).bool()
        same = subjects[:, None] == subjects[None]
        alike = (families[:, None] == families[None]) & ~same
        found[name] = round(area_under_curve(cosine[pair & same], cosine[pair & alike]), 4)
    return found


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
