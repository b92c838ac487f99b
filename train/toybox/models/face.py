"""Trains the face recogniser: an ID vector by which images of one person are alike, whatever else they show.

`face_metric` trains the other one, which measures; both are written as `model.backbones.features.face` reads them.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, ResNetConfig

from model.backbones.features.face import IDENTITY, FaceRecogniser, load_recogniser
from model.backbones.variant import RecogniserSpec
from pipelines.toybox.faces import people
from runtime.cli import guarded
from train.toybox.lessons import data
from train.toybox.lessons.augment import degrade, on_white, to_planes
from train.toybox.lessons.faces import FACES, celebrities
from train.toybox.lessons.worlds import World
from train.toybox.loop import cards, loop
from train.toybox.models import dino, judge, paint, vae
from train.toybox.models.dino import SHAPE, area_under_curve, normalise, save_processor

WIDTH = 128
"""Of the ID vector."""
DECODED = 0.5
"""Share of whole images that are as decoded by the autoencoder, of those that there are: generated ones look like
that."""
RISE = 0.4
"""Share of the steps in which the margin grows from 0: a new network with the whole margin does not begin to learn."""


@dataclass(frozen=True)
class Margin:
    """What the loss asks beyond the right person: "angle" (ArcFace, Deng et al. 2019) or "cosine" (CosFace, Wang et al.
    2018), by how much, and the scale of the logits."""

    kind: Literal["angle", "cosine"]
    size: float
    scale: float


@dataclass(frozen=True)
class RecogniserPlan:
    """One of the two recognisers. name: its folder. people: the set of images. config: a network's, see
    `FaceRecogniser.of`. cut: share of a batch that is the head cut out on white, as references are; the others are
    whole images. start: folder of a network of this config whose weights it starts from."""

    name: str
    people: str
    margin: Margin
    recipe: loop.Recipe
    config: dict[str, Any]
    cut: float
    start: Path | None = None

    @property
    def folder(self) -> Path:
        return FACES.weights / self.name


RECIPE = loop.Recipe(
    steps=1200,
    batch=128,
    lr=2e-3,
    warmup=100,
    average=0.998,
    weight_decay=0.05,
    precision="bfloat16",
    muon=True,
    seed=101,
)
# 10,800 images 14 times. Published are scale 64 and margin .5, of millions of photos at 112 pixels.
FACE = RecogniserPlan(
    "face",
    "views",
    Margin("angle", 0.3, 30.0),
    RECIPE,
    Dinov2Config(**SHAPE, use_mask_token=False).to_dict(),  # the token is of pretraining alone
    cut=0.4,
    start=dino.FOLDER,
)
# Everything else than the one that it measures: architecture, loss, seed and people. Scores are of heads cut out on
# white; whole images it would learn by heart, each by its scene.
METRIC = RecogniserPlan(
    "face_metric",
    "metric-views",
    Margin("cosine", 0.2, 30.0),
    replace(RECIPE, seed=102),
    ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 96, 160], depths=[2, 2, 1, 1], layer_type="basic").to_dict(),
    cut=1.0,
)


def margin_logits(vectors: Tensor, centres: Tensor, people: Tensor, margin: Margin, share: float = 1.0) -> Tensor:
    """Logits [B, C] of vectors [B, e] against the centres [C, e] of C people; that of the right one (`people` [B]) is
    lowered by `share` of the margin.

    ArcFace: cos(angle + m), and cos(angle) - m sin(m) beyond pi - m, where the former would rise again. CosFace:
    cos(angle) - m.
    """
    cosine = F.normalize(vectors, dim=1) @ F.normalize(centres, dim=1).T
    own = cosine.gather(1, people[:, None])
    size = margin.size * share
    if margin.kind == "angle":
        sine = (1 - own.square()).clamp(min=1e-7).sqrt()
        turned = own * math.cos(size) - sine * math.sin(size)
        lowered = torch.where(own > -math.cos(size), turned, own - size * math.sin(size))
    else:
        lowered = own - size
    return margin.scale * cosine.scatter(1, people[:, None], lowered)


class RecogniserInTraining(nn.Module):
    """The recogniser, and a centre for each person of the training set, which is not kept."""

    def __init__(self, net: FaceRecogniser, count: int) -> None:
        super().__init__()
        self.net = net
        self.centres = nn.Embedding(count, WIDTH)
        # Short, as only the direction counts: a step of the optimizer turns a long one by next to nothing.
        nn.init.normal_(self.centres.weight, std=0.05)


def build(plan: RecogniserPlan) -> FaceRecogniser:
    """A recogniser before its training."""
    net = FaceRecogniser.of(plan.config, WIDTH)
    if plan.start:
        known = type(net.network).from_pretrained(plan.start, dtype=torch.float32).state_dict()
        net.network.load_state_dict({name: known[name] for name in net.network.state_dict()})
    return net


def pixels_of(images: Tensor, masks: Tensor, share: float, draw: loop.LessonDraw) -> Tensor:
    """Network inputs [B, 3, 64, 64] of uint8 images [B, 64, 64, 3], the last `share` of them heads on white."""
    cut = len(images) - round(share * len(images))
    full = degrade(images[:cut], draw.rng, 0.3)
    white = degrade(on_white(images[cut:], masks[cut:], draw.rng).permute(0, 2, 3, 1), draw.rng, 0.3)
    return normalise(torch.cat([full, white])).to(draw.device, draw.dtype)


def train(plan: RecogniserPlan, words: Sequence[str]) -> None:
    """Train one of the recognisers."""
    training = loop.options(f"Train {plan.name}, a small face recogniser.", {FACES.name: plan.recipe}, words)
    recipe = training.recipe
    torch.manual_seed(recipe.seed)
    views = data.open_set(FACES, plan.people)
    model = RecogniserInTraining(build(plan), views.spec.subjects)
    decoded = vae.decoded(views) if training.minutes != 0 else views

    def loss(draw: loop.LessonDraw) -> tuple[Tensor, dict[str, float]]:
        rows = draw.rng.integers(0, len(views), draw.batch)
        images = views.images[rows]
        again = (rows < len(decoded)) & (draw.rng.random(draw.batch) < DECODED)
        images[again] = decoded.images[rows[again]]
        mirrored = draw.rng.random(draw.batch) < 0.5
        masks = views.regions[rows] == data.SUBJECT
        images[mirrored], masks[mirrored] = images[mirrored, :, ::-1], masks[mirrored, :, ::-1]
        who = torch.from_numpy(rows // views.spec.views).to(draw.device)
        vectors = model.net(pixels_of(torch.from_numpy(images), torch.from_numpy(masks), plan.cut, draw)).float()
        share = min(1.0, draw.step / (RISE * recipe.steps))
        centres = model.centres.weight.float()
        first = float((nearest(vectors.detach(), centres.detach()) == who).float().mean())
        return F.cross_entropy(margin_logits(vectors, centres, who, plan.margin, share), who), {"first": first}

    loop.fit(model, loss, recipe, training.run(plan.name), training.minutes)
    settle(model.net, views, plan.cut)
    export(plan, model.net, views, training)


@torch.no_grad()
def settle(net: FaceRecogniser, views: data.Pictures, share: float, batches: int = 16) -> None:
    """Measure the statistics of a batch norm, in place, with the final weights: those of training belong to other ones
    (the moving average is what is published), and no checkpoint holds them."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    recipe = loop.Recipe(steps=1, lr=0.0, batch=128, seed=103)
    net.to("cpu").train()
    for step in range(batches if norms else 0):
        draw = loop.LessonDraw.at(recipe, step, torch.device("cpu"))
        rows = draw.rng.integers(0, len(views), draw.batch)
        masks = torch.from_numpy(views.regions[rows] == data.SUBJECT)
        net(pixels_of(torch.from_numpy(views.images[rows]), masks, share, draw))
    net.eval()


def export(plan: RecogniserPlan, net: FaceRecogniser, views: data.Pictures, training: loop.Training) -> None:
    """Write the transformers folder with the Linear of the ID vector beside it."""
    measured = measure(net)
    save_processor(plan.folder)
    net.network.half().save_pretrained(plan.folder)
    net.network.float()
    cards.save_half(net.identity.state_dict(), plan.folder / IDENTITY)
    cards.write(plan.folder, training.run(plan.name), training.recipe, [views], measured)


def load(plan: RecogniserPlan) -> FaceRecogniser:
    """The published recogniser, which gives ID vectors alone."""
    return load_recogniser(RecogniserSpec(path=str(plan.folder))).eval()


@torch.no_grad()
def vectors_of(net: FaceRecogniser, planes: Tensor) -> Tensor:
    """Unit ID vectors [B, e] of images [B, 3, 64, 64] in 0..255."""
    return torch.cat([F.normalize(net(normalise(part)), dim=1) for part in planes.split(64)])


def measure(net: FaceRecogniser) -> dict[str, float]:
    """ROC-AUC of cosines on people of no training set, over views and expressions: same person against any other one,
    in whole images, as decoded by the autoencoder, and as heads on white, rendered and decoded; `alike`: against others
    of the same noun, skin and hair style."""
    held = data.open_set(FACES, "views-test")
    images, masks = torch.tensor(held.images), torch.tensor(held.regions) == data.SUBJECT
    who = torch.arange(len(held)) // held.spec.views
    same, pair = who[:, None] == who[None], torch.ones(len(who), len(who)).triu(1).bool()
    look = torch.stack([torch.tensor(held.column(name).astype(np.int64)) for name in ("noun", "skin", "hair")], 1)
    alike = (look[:, None] == look[None]).all(2) & ~same
    found, decoded = {}, torch.tensor(vae.decoded(held).images)
    inputs = {
        "auc": to_planes(images),
        "auc_decoded": to_planes(decoded),
        "auc_cut_out": on_white(images, masks, None),
        "auc_cut_out_decoded": on_white(decoded, masks, None),
    }
    for name, planes in inputs.items():
        unit = vectors_of(net, planes)
        cosine = unit @ unit.T
        found[name] = round(area_under_curve(cosine[pair & same], cosine[pair & ~same]), 4)
        if name in ("auc", "auc_cut_out"):
            found[f"{name}_alike"] = round(area_under_curve(cosine[pair & same], cosine[pair & alike]), 4)
    return found


ASKED = 4
"""Prompts of each name."""


def name_prompts(world: World) -> Iterator[tuple[str, int, list[int]]]:
    """Prompts with a name, whose it is, and the attributes asked for: photos, of any expression, clothes and scene."""
    for who, (name, person) in enumerate(celebrities()):
        for number in range(ASKED):
            rng = np.random.default_rng([7, who, number])
            outfit = people.sample_outfit(rng, worn=0.3, job=0.2, expression=0.6)
            yield (
                people.caption(person, outfit, name),
                who,
                world.row((person, people.sample_portrait_view(rng), outfit)),
            )


def nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    """Place [B] of the centre of largest cosine; vectors [B, e] and centres [C, e] of any length."""
    return (vectors @ F.normalize(centres, dim=1).T).argmax(1)


def measure_names(world: World) -> dict[str, float]:
    """Of images generated for prompts with a name: how often the metric net finds that celebrity nearest, by mean
    vectors of six renders each (`name`; `name_of_renders`: of two other renders, a ceiling), and how often the judge
    sees what the prompt asks of expression, clothes and scene (`name_<attribute>`).

    Heads are cut out on white, by the judge's mask if generated: scene and clothes tell nothing of who it is."""
    texts, who, rows = zip(*name_prompts(world), strict=True)
    net, known = load(METRIC), data.open_set(world, "names-test")
    renders = on_white(torch.tensor(known.images), torch.tensor(known.regions) == data.SUBJECT, None)
    unit = vectors_of(net, renders).reshape(-1, known.spec.views, WIDTH)
    centres, people_of = unit[:, :-2].mean(1), torch.arange(len(unit))
    images = paint.generate(world, list(texts))
    seen, masks = judge.verdicts(judge.load_judge(world), images)
    found = {
        "name": nearest(vectors_of(net, on_white(images, masks, None)), centres) == torch.tensor(who),
        "name_of_renders": nearest(unit[:, -2:].flatten(0, 1), centres) == people_of.repeat_interleave(2),
    }
    table = np.array(rows, np.int16)
    asked = paint.columns(world, world.asked(table))
    for name in ("expression", "wear", "scene"):
        right = seen[name] == torch.from_numpy(world.column(table, name).astype(np.int64))
        found[f"name_{name}"] = right[asked[name]]
    return {name: round(float(right.float().mean()), 4) for name, right in found.items()}


if __name__ == "__main__":
    guarded(lambda: train(FACE, sys.argv[1:]))
