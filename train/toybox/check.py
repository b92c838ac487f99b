"""Measures every small backbone from its published folder: a line for each goal, exit code 1 where one is short."""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file
from transformers import Dinov2Model, GroundingDinoForObjectDetection, GroundingDinoProcessor

from model.backbones.sam import build_sam
from params import UserError, cli
from train.toybox import clip, data, detector, dino, paint, sam, text_to_image, vae

LIMIT = 40.0
"""Megabytes that all weights together may weigh."""


@dataclass(frozen=True)
class Line:
    """One goal: what was measured, what blind guessing reaches, what is wanted."""

    name: str
    measured: float
    chance: float | None
    target: float
    most: bool = False
    """Whether the target is the most allowed and not the least."""

    @property
    def ok(self) -> bool:
        return self.measured <= self.target if self.most else self.measured >= self.target

    def __str__(self) -> str:
        chance = "-" if self.chance is None else f"{self.chance:.3f}"
        return f"{self.name:28} {self.measured:8.3f} {chance:>8} {self.target:8.3f}  {'ok' if self.ok else 'short'}"


def sam_lines() -> Iterator[Line]:
    model = build_sam(sam.CONFIG)
    model.load_state_dict({k: v.float() for k, v in load_file(sam.FOLDER / "model.safetensors").items()})
    found = sam.measure(model.eval())
    yield Line("sam IoU from boxes", found["iou_box"], found["filled_box"], 0.88)
    yield Line("sam IoU from one point", found["iou_point"], None, 0.80)


def vae_lines() -> Iterator[Line]:
    model, _ = text_to_image.load_vae()
    yield Line("vae PSNR, dB", vae.measure(model)["psnr"], None, 25.0)


def clip_lines() -> Iterator[Line]:
    model = open_clip.create_model(f"local-dir:{clip.FOLDER}", require_pretrained=True).eval()
    found = clip.measure(model)
    yield Line("clip caption of 100", found["caption_of_100"], 0.01, 0.25)
    yield Line("clip picture of 100", found["picture_of_100"], 0.01, 0.25)
    yield Line("clip caption of 20, one scene", found["caption_of_20_same_scene"], 0.05, 0.25)


def dino_lines() -> Iterator[Line]:
    found = dino.measure(Dinov2Model.from_pretrained(dino.FOLDER, dtype=torch.float32).eval())
    yield Line("dino AUC, cut-outs", found["auc_cut_out"], 0.5, 0.95)
    yield Line("dino AUC, whole pictures", found["auc_picture"], 0.5, 0.80)


def detector_lines() -> Iterator[Line]:
    model = GroundingDinoForObjectDetection.from_pretrained(detector.FOLDER, dtype=torch.float32).eval()
    found = detector.measure(model, GroundingDinoProcessor.from_pretrained(detector.FOLDER))
    yield Line("detector mean IoU", found["iou"], found["centre_iou"], 0.80)
    yield Line("detector IoU >= 0.5", found["share_above_half"], found["centre_above_half"], 0.98)
    yield Line("detector right noun wins", found["right_noun_wins"], 0.5, 0.80)


def diffusion_lines() -> Iterator[Line]:
    found = paint.measure()
    for name, target in (("scene", 0.85), ("colour", 0.6), ("family", 0.5), ("pattern", 0.3)):
        yield Line(f"text-to-image {name}", found[name], 1 / len(data.ATTRIBUTES[name]), target)


def size_lines() -> Iterator[Line]:
    files = [file for file in Path("weights/toybox").rglob("*") if file.is_file()]
    yield Line("weights together, MB", sum(file.stat().st_size for file in files) / 1e6, None, LIMIT, most=True)


PARTS: dict[str, Callable[[], Iterator[Line]]] = {
    "size": size_lines,
    "sam": sam_lines,
    "vae": vae_lines,
    "clip": clip_lines,
    "dino": dino_lines,
    "detector": detector_lines,
    "diffusion": diffusion_lines,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the small backbones against their targets.")
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"some of {', '.join(PARTS)}; all by default")
    chosen = parser.parse_args().parts
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise UserError(f"there is no part '{unknown[0]}'; choose from {', '.join(PARTS)}")
    for name in ("pictures-test", "views-test"):
        data.prepare(data.SETS[name])
    short = 0
    print(f"{'name':28} {'measured':>8} {'chance':>8} {'target':>8}")
    for part in chosen:
        for line in PARTS[part]():
            print(line, flush=True)
            short += not line.ok
    sys.exit(1 if short else 0)


if __name__ == "__main__":
    cli(main)
