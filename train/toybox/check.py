"""Measures every small backbone from its published folder: prints one line per goal; exits 1 if a goal is missed."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file
from transformers import Dinov2Model, GroundingDinoForObjectDetection, GroundingDinoProcessor

from model.backbones.reward import load_reward
from model.backbones.segmenters.sam import build_sam
from model.backbones.variant import Spec
from runtime.cli import Parser, guarded
from runtime.errors import UserError
from train.toybox.lessons import data
from train.toybox.lessons.boxes import boxes_of, iou
from train.toybox.models import clip, detector, dino, judge, paint, reward, sam, vae

LIMIT = 60.0
"""Maximum total size of all weights, in megabytes."""


@dataclass(frozen=True)
class CheckLine:
    """One goal: the measurement and its target, beside blind guessing (chance) and a perfect image (ceiling)."""

    name: str
    measured: float
    target: float
    chance: float | None = None
    ceiling: float | None = None
    most: bool = False
    """Whether the target is a maximum rather than a minimum."""

    @property
    def ok(self) -> bool:
        return self.measured <= self.target if self.most else self.measured >= self.target

    def __str__(self) -> str:
        ceiling, chance = ("-" if v is None else f"{v:.3f}" for v in (self.ceiling, self.chance))
        verdict = "ok" if self.ok else "short"
        return f"{self.name:32} {self.measured:8.3f} {self.target:8.3f} {ceiling:>8} {chance:>8}  {verdict}"


HEAD = f"{'':32} {'measured':>8} {'target':>8} {'ceiling':>8} {'chance':>8}"

PAINTED = {"family": 0.90, "colour": 0.85, "pattern": 0.75, "scene": 0.95, "style": 0.90, "dress": 0.80}
"""Minimum fraction of generated images in which the judge sees the attribute that the caption names."""


def size_lines() -> Iterator[CheckLine]:
    files = [file for file in Path("weights/toybox").rglob("*") if file.is_file()]
    yield CheckLine("weights together, MB", sum(file.stat().st_size for file in files) / 1e6, LIMIT, most=True)


def vae_lines() -> Iterator[CheckLine]:
    yield CheckLine("vae PSNR, dB", vae.measure(vae.load_vae()[0])["psnr"], 25.0)


def judge_lines() -> Iterator[CheckLine]:
    found = judge.measure(judge.load_judge())
    for name in PAINTED:
        yield CheckLine(f"judge {name}", found[name], 0.97, 1 / len(data.ATTRIBUTES[name]))
    yield CheckLine("judge box IoU >= 0.8", found["box"], 0.95)


def sam_lines() -> Iterator[CheckLine]:
    model = build_sam(sam.CONFIG)
    model.load_state_dict({k: v.float() for k, v in load_file(sam.FOLDER / "model.safetensors").items()})
    found = sam.measure(model.eval())
    yield CheckLine("sam IoU from boxes", found["iou_box"], 0.95, found["filled_box"])
    yield CheckLine("sam IoU from one point", found["iou_point"], 0.90)


def clip_lines() -> Iterator[CheckLine]:
    model = open_clip.create_model(f"local-dir:{clip.FOLDER}", require_pretrained=True).eval()
    found = clip.measure(model)
    yield CheckLine("clip image of 100", found["picture_of_100"], 0.90, 0.01)
    yield CheckLine("clip caption of 100", found["caption_of_100"], 0.90, 0.01)
    yield CheckLine("clip caption of 20, one scene", found["caption_of_20_same_scene"], 0.80, 0.05)


def dino_lines() -> Iterator[CheckLine]:
    found = dino.measure(Dinov2Model.from_pretrained(dino.FOLDER, dtype=torch.float32).eval())
    yield CheckLine("dino AUC, cut-outs", found["auc_cut_out"], 0.95, 0.5)
    yield CheckLine("dino AUC, whole images", found["auc_picture"], 0.95, 0.5)


def reward_lines() -> Iterator[CheckLine]:
    model = load_reward(Spec(path=str(reward.FOLDER)), torch.device("cpu"), torch.float32, 64).model
    yield CheckLine("reward, right caption wins", reward.measure(model)["prefers"], 0.95, 0.5)


def detector_lines() -> Iterator[CheckLine]:
    model = GroundingDinoForObjectDetection.from_pretrained(detector.FOLDER, dtype=torch.float32).eval()
    processor = GroundingDinoProcessor.from_pretrained(detector.FOLDER)
    found = detector.measure(model, processor)
    yield CheckLine("detector IoU >= 0.8", found["share_above_0.8"], 0.95, found["centre_above_0.8"])
    yield CheckLine("detector right noun wins", found["right_noun_wins"], 0.90, 0.5)
    painted = paint.painted(paint.PROMPTS)
    boxes, _ = detector.find(model, processor, painted.images, painted.wanted["family"].numpy())
    truth = boxes_of(painted.masks.numpy())
    centre = np.tile(np.median(truth, 0), (len(truth), 1))
    yield CheckLine(
        "detector on generated, IoU >= 0.8",
        float((iou(boxes, truth) >= 0.8).mean()),
        0.90,
        float((iou(centre, truth) >= 0.8).mean()),
    )


def diffusion_lines() -> Iterator[CheckLine]:
    found, ceiling = paint.measure(), judge.measure(judge.load_judge())
    for name, target in PAINTED.items():
        yield CheckLine(f"text-to-image {name}", found[name], target, 1 / len(data.ATTRIBUTES[name]), ceiling[name])


PARTS: dict[str, Callable[[], Iterator[CheckLine]]] = {
    "size": size_lines,
    "vae": vae_lines,
    "judge": judge_lines,
    "sam": sam_lines,
    "clip": clip_lines,
    "dino": dino_lines,
    "reward": reward_lines,
    "diffusion": diffusion_lines,
    "detector": detector_lines,
}


def main(words: Sequence[str]) -> None:
    parser = Parser(description="Measure the small backbones against their targets.")
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"any of {', '.join(PARTS)} (default: all)")
    chosen = parser.parse_args(words).parts
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise UserError(f"there is no part '{unknown[0]}'; choose from {', '.join(PARTS)}")
    for name in ("pictures-test", "views-test"):
        data.prepare(data.SETS[name])
    missed = 0
    print(HEAD)
    for part in chosen:
        for line in PARTS[part]():
            print(line, flush=True)
            missed += not line.ok
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
