"""Measures every small backbone from its published folder: prints one line per goal; exits 1 if a goal is missed."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
from transformers import Dinov2Model, GroundingDinoForObjectDetection, GroundingDinoProcessor

from model.backbones.reward import load_reward
from model.backbones.variant import Spec
from runtime.cli import Parser, guarded
from runtime.errors import UserError
from train.toybox.lessons import data
from train.toybox.lessons.boxes import boxes_of, iou
from train.toybox.lessons.registry import FACES, TOYS, WORLDS
from train.toybox.lessons.worlds import World
from train.toybox.models import clip, detector, dino, face, judge, paint, reward, sam, vae

LIMITS = {TOYS.name: 60.0, FACES.name: 32.0}
"""Maximum total size of a world's weights, in megabytes; what is a link into another world's is counted there."""


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


def size_lines(world: World) -> Iterator[CheckLine]:
    files = [file for file in world.weights.rglob("*") if file.is_file() and not file.is_symlink()]
    size = sum(file.stat().st_size for file in files) / 1e6
    yield CheckLine("weights together, MB", size, LIMITS[world.name], most=True)


def vae_lines(world: World) -> Iterator[CheckLine]:
    yield CheckLine("vae PSNR, dB", vae.measure(vae.load_vae()[0])["psnr"], 25.0)


def judge_lines(world: World) -> Iterator[CheckLine]:
    found = judge.measure(world, judge.load_judge(world))
    for name, target in world.judged.items():
        yield CheckLine(f"judge {name}", found[name], target, 1 / len(world.attributes[name]))
    yield CheckLine("judge box IoU >= 0.8", found["box"], 0.95)


def sam_lines(world: World) -> Iterator[CheckLine]:
    found = sam.measure(world, sam.load_sam(world))
    yield CheckLine("sam IoU from boxes", found["iou_box"], 0.95, found["filled_box"])
    yield CheckLine("sam IoU from one point", found["iou_point"], 0.90)
    if world.whole:
        yield CheckLine("sam IoU of all that is worn", found["iou_whole"], 0.95)


def clip_lines(world: World) -> Iterator[CheckLine]:
    model = open_clip.create_model(f"local-dir:{clip.folder(world)}", require_pretrained=True).eval()
    found = clip.measure(world, model)
    yield CheckLine("clip image of 100", found["picture_of_100"], 0.90, 0.01)
    yield CheckLine("clip caption of 100", found["caption_of_100"], 0.90, 0.01)
    yield CheckLine("clip caption of 20, one scene", found["caption_of_20_same_scene"], 0.80, 0.05)


def dino_lines(world: World) -> Iterator[CheckLine]:
    found = dino.measure(Dinov2Model.from_pretrained(dino.FOLDER, dtype=torch.float32).eval())
    yield CheckLine("dino AUC, cut-outs", found["auc_cut_out"], 0.95, 0.5)
    yield CheckLine("dino AUC, whole images", found["auc_picture"], 0.95, 0.5)


def reward_lines(world: World) -> Iterator[CheckLine]:
    model = load_reward(Spec(path=str(reward.FOLDER)), torch.device("cpu"), torch.float32, 64).model
    yield CheckLine("reward, right caption wins", reward.measure(model)["prefers"], 0.95, 0.5)


def detector_lines(world: World) -> Iterator[CheckLine]:
    place = detector.folder(world)
    model = GroundingDinoForObjectDetection.from_pretrained(place, dtype=torch.float32).eval()
    processor = GroundingDinoProcessor.from_pretrained(place)
    found = detector.measure(world, model, processor)
    yield CheckLine("detector IoU >= 0.8", found["share_above_0.8"], 0.95, found["centre_above_0.8"])
    yield CheckLine("detector right noun wins", found["right_noun_wins"], 0.90, 0.5)
    painted = paint.painted(world.name, paint.PROMPTS)
    table = torch.stack(list(painted.wanted.values()), 1).numpy().astype(np.int16)
    boxes, _ = detector.find(world, model, processor, painted.images, world.subject_phrase(table))
    truth = boxes_of(painted.masks.numpy())
    centre = np.tile(np.median(truth, 0), (len(truth), 1))
    yield CheckLine(
        "detector on generated, IoU >= 0.8",
        float((iou(boxes, truth) >= 0.8).mean()),
        0.90,
        float((iou(centre, truth) >= 0.8).mean()),
    )


def diffusion_lines(world: World) -> Iterator[CheckLine]:
    found, ceiling = paint.measure(world), judge.measure(world, judge.load_judge(world))
    for name, target in world.painted.items():
        yield CheckLine(f"text-to-image {name}", found[name], target, 1 / len(world.attributes[name]), ceiling[name])


def face_lines(world: World) -> Iterator[CheckLine]:
    for plan in (face.FACE, face.METRIC):
        found, name = face.measure(face.load(plan)), plan.name.replace("_", " ")
        seen = {"whole images": "auc", "cut-outs": "auc_cut_out"} if plan.cut < 1 else {"cut-outs": "auc_cut_out"}
        for what, key in seen.items():
            yield CheckLine(f"{name} AUC, {what}", found[key], 0.97, 0.5)
            lost = found[key] - found[f"{key}_decoded"]
            yield CheckLine(f"{name} AUC lost, {what}", lost, 0.01, most=True)


def name_lines(world: World) -> Iterator[CheckLine]:
    found = face.measure_names(world)
    yield CheckLine("name, right one of all", found["name"], 0.80, 1 / len(world.names), found["name_of_renders"])
    for name in ("expression", "wear", "scene"):
        yield CheckLine(f"name, {name} as asked", found[f"name_{name}"], 0.90, 1 / len(world.attributes[name]))


Lines = Callable[[World], Iterator[CheckLine]]
PARTS: dict[str, dict[str, Lines]] = {
    TOYS.name: {
        "size": size_lines,
        "vae": vae_lines,
        "judge": judge_lines,
        "sam": sam_lines,
        "clip": clip_lines,
        "dino": dino_lines,
        "reward": reward_lines,
        "diffusion": diffusion_lines,
        "detector": detector_lines,
    },
    FACES.name: {
        "size": size_lines,
        "judge": judge_lines,
        "sam": sam_lines,
        "clip": clip_lines,
        "face": face_lines,
        "diffusion": diffusion_lines,
        "names": name_lines,
        "detector": detector_lines,
    },
}
"""What is measured in each world, in order."""
MEASURED_ON = {TOYS.name: ("pictures-test", "views-test"), FACES.name: ("pictures-test", "views-test", "names-test")}
"""The sets that it is measured on."""


def main(words: Sequence[str]) -> None:
    parser = Parser(description="Measure the small backbones against their targets.")
    parser.add_argument("parts", nargs="*", help="some of the world's parts (default: all)")
    parser.add_argument("--world", choices=list(WORLDS), default=TOYS.name, help="default: %(default)s")
    options = parser.parse_args(words)
    world, parts = WORLDS[options.world], PARTS[options.world]
    unknown = [part for part in options.parts if part not in parts]
    if unknown:
        raise UserError(f"there is no part '{unknown[0]}'; choose from {', '.join(parts)}")
    for name in MEASURED_ON[world.name]:
        data.prepare(world, name)
    missed = 0
    print(HEAD)
    for part in options.parts or parts:
        for line in parts[part](world):
            print(line, flush=True)
            missed += not line.ok
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
