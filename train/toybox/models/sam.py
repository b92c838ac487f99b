"""Trains the small Segment Anything model: box or points in, subject mask out."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from segment_anything.modeling import Sam
from torch import Tensor

from model.backbones.segmenters.sam import SamConfig, build_sam
from runtime.cli import guarded
from train.toybox.lessons import data
from train.toybox.lessons.augment import degrade, to_planes
from train.toybox.lessons.boxes import boxes_of, jitter
from train.toybox.lessons.registry import FACES, TOYS
from train.toybox.lessons.worlds import World
from train.toybox.loop import cards, loop
from train.toybox.models import vae

CONFIG = SamConfig(
    image_size=data.SIZE,
    patch_size=4,
    depth=4,
    width=128,
    heads=4,
    window_size=8,
    global_attention=(1, 3),
    relative_position=False,
    mlp_ratio=3.0,
    prompt_embed_dim=128,
    mask_in_channels=16,
    decoder_heads=4,
    decoder_mlp_dim=256,
    iou_head_dim=64,
)
RECIPE = loop.Recipe(
    steps=2800, batch=16, lr=1.5e-3, warmup=200, average=0.998, precision="autocast", muon=True, seed=31
)
# Tuned from the toys' weights: half the steps, at a third of the rate.
RECIPES = {TOYS.name: RECIPE, FACES.name: replace(RECIPE, steps=1400, lr=5e-4)}


def folder(world: World) -> Path:
    """Where the model is."""
    return world.weights / "sam"


def load_sam(world: World) -> Sam:
    """The published model of a world, in float32."""
    sam = build_sam(CONFIG)
    state = load_file(folder(world) / "model.safetensors")
    sam.load_state_dict({name: value.float() for name, value in state.items()})
    return sam.eval()


def predict(sam: Sam, images: Tensor, boxes: Tensor | None, points: Tensor | None) -> tuple[Tensor, Tensor]:
    """One prompt per image, batched; `Sam.forward` processes images one by one.

    images: [B, 3, 64, 64] in 0..255. boxes: [B, 4] x0 y0 x1 y1 in pixels, points: [B, n, 2] x y, all on the subject;
    either may be None. Returns mask logits [B, 4, 64, 64], the first of them for unambiguous prompts, and predicted
    IoUs [B, 4]. Follows `segment_anything` MaskDecoder.predict_masks.
    """
    prompts = None if points is None else (points, torch.ones(points.shape[:2], device=points.device))
    sparse, dense = sam.prompt_encoder(points=prompts, boxes=boxes, masks=None)
    decoder = sam.mask_decoder
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([tokens.expand(len(images), -1, -1), sparse], 1)
    source = sam.image_encoder(sam.preprocess(images)) + dense
    place = sam.prompt_encoder.get_dense_pe().expand(len(images), -1, -1, -1)
    b, c, h, w = source.shape
    hidden, source = decoder.transformer(source, place, tokens)
    upscaled = decoder.output_upscaling(source.transpose(1, 2).reshape(b, c, h, w))
    heads = [mlp(hidden[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    masks = torch.einsum("bkc,bchw->bkhw", torch.stack(heads, 1), upscaled)
    masks = F.interpolate(masks.float(), images.shape[-2:], mode="bilinear", align_corners=False)
    return masks, decoder.iou_prediction_head(hidden[:, 0]).float()


def points_on(regions: NDArray[np.bool_], count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Random pixels of each mask, x y, [B, count, 2]; the image centre if a mask is empty."""
    score = rng.random((count, *regions.shape), dtype=np.float32) * regions
    best = score.reshape(count, len(regions), -1).argmax(2).T
    best = np.where(np.asarray(regions.any((1, 2)))[:, None], best, regions[0].size // 2 + regions.shape[2] // 2)
    return np.stack([best % regions.shape[2], best // regions.shape[2]], 2).astype(np.float32)


def mask_losses(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (20 focal + dice, as in SAM's training) and true IoU of every predicted mask, both [B, K]."""
    target = truth[:, None].expand_as(logits)
    probability = logits.sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = (cross * (1 - (probability * target + (1 - probability) * (1 - target))) ** 2).mean((2, 3))
    dice = 1 - (2 * (probability * target).sum((2, 3)) + 1) / (probability.sum((2, 3)) + target.sum((2, 3)) + 1)
    with torch.no_grad():
        hit = logits > 0
        iou = (hit * target).sum((2, 3)) / torch.maximum(hit.float(), target).sum((2, 3)).clamp(min=1)
    return 20 * focal + dice, iou


def main(words: Sequence[str]) -> None:
    training = loop.options("Train the small Segment Anything model.", RECIPES, words)
    world, recipe, run = training.world, training.recipe, training.run("sam")
    torch.manual_seed(recipe.seed)
    sam = build_sam(CONFIG) if world is TOYS else load_sam(TOYS)
    pictures = data.open_set(world, "pictures")
    sets = [pictures, data.open_set(world, "views"), vae.decoded(pictures)]

    def loss(draw: loop.LessonDraw) -> tuple[Tensor, dict[str, float]]:
        images, regions, _ = data.batch(sets, draw.batch, draw.rng)
        truth = regions == data.SUBJECT
        pixels = degrade(torch.from_numpy(images), draw.rng).to(draw.device)
        kind = draw.step % 4
        if world.whole and kind != 3:  # a point alone asks for the subject
            truth = np.where((draw.rng.random(draw.batch) < world.whole)[:, None, None], regions > 0, truth)
        boxes = jitter(boxes_of(truth), 0.04 + 0.06 * draw.rng.random(), data.SIZE, draw.rng) if kind != 3 else None
        points = points_on(truth, int(draw.rng.integers(1, 4)), draw.rng) if kind >= 2 else None
        prompts = (None if p is None else torch.from_numpy(p).to(draw.device) for p in (boxes, points))
        logits, quality = predict(sam, pixels, *prompts)
        losses, iou = mask_losses(logits, torch.from_numpy(truth).float().to(draw.device))
        score = F.mse_loss(quality, iou)
        total = losses[:, 0].mean() + 0.5 * losses[:, 1:].amin(1).mean() + score
        return total, {"iou": float(iou[:, 0].mean()), "score": score.item()}

    loop.fit(sam, loss, recipe, run, training.minutes)
    export(sam, sets, training)


def export(sam: Sam, sets: list[data.Pictures], training: loop.Training) -> None:
    """Write the folder that `model.backbones.grounded_sam` reads."""
    place = folder(training.world)
    cards.save_half(sam.state_dict(), place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(CONFIG.model_dump(), indent=1) + "\n")
    cards.write(place, training.run("sam"), training.recipe, sets, measure(training.world, sam))


@torch.no_grad()
def measure(world: World, sam: Sam) -> dict[str, float]:
    """Mean IoU on held-out subjects from tight boxes, boxes jittered by 6 % and one point, and of the tight
    box; of people also of all that is worn, from tight boxes."""
    held = data.open_set(world, "pictures-test")
    rng, found = np.random.default_rng(0), {}
    truth = np.asarray(held.regions) == data.SUBJECT
    prompts = {
        "iou_box": (truth, boxes_of(truth), None),
        "iou_loose_box": (truth, jitter(boxes_of(truth), 0.06, data.SIZE, rng), None),
        "iou_point": (truth, None, points_on(truth, 1, rng)),
    }
    if world.whole:
        whole = np.asarray(held.regions) > 0
        prompts["iou_whole"] = (whole, boxes_of(whole), None)
    for name, (wanted, *given) in prompts.items():
        total = 0.0
        for rows in (slice(i, i + 64) for i in range(0, len(held), 64)):
            pixels = to_planes(torch.tensor(held.images[rows]))
            part = [None if p is None else torch.from_numpy(p[rows]) for p in given]
            total += float(
                mask_losses(predict(sam, pixels, *part)[0], torch.from_numpy(wanted[rows]).float())[1][:, 0].sum()
            )
        found[name] = round(total / len(held), 4)
    boxes = boxes_of(truth)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    found["filled_box"] = round(float((truth.sum((1, 2)) / np.maximum(areas, 1)).mean()), 4)
    return found


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
