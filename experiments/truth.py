"""Ground-truth metrics of generated images, available only in the toybox: attributes kept and followed, pose leakage.

`python -m experiments.truth` reads the tables and generations under --data, and writes DATA/truth/metrics.json.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eval.score.metrics import MODEL, PROMPT_ONLY
from model.images.segment import on_white
from pipelines import tables
from pipelines.toybox import layouts
from pipelines.toybox.prompts import asked
from pipelines.toybox.rendering.march import View
from pipelines.toybox.rendering.scenes import BLANK
from pipelines.toybox.stage import ToyboxParams
from pipelines.toybox.world import NEAR, Item, Look, Toy, apart, render
from runtime.cli import Parser, guarded, read_params, shared_options
from runtime.files import write_json
from train.toybox.lessons.toys import ATTRIBUTES, TOYS
from train.toybox.models.judge import Judge, load_judge, verdicts

AZIMUTHS = np.arange(-180, 180, 15)
"""Degrees; azimuths of the renders that an image's pose is matched against."""
ELEVATIONS = (12.0, 25.0, 38.0)
"""Degrees; covers the range of the photos."""
READABLE = 0.6
"""Fraction of a subject's own photos whose azimuth must be read correctly; a ball's pose, say, cannot be read."""
SIDE = 32
"""Side in pixels of the cut-outs on which poses are compared."""
MARGIN = 2
"""Pixels around a subject that count as part of it: an outline is nowhere sharp at this size."""
IMAGE = ("subject_id", "group", "prompt_id", "index")
"""Columns that name an image of one method."""
PLAIN = "plain"
"""Folder of generations of the prompt alone, beside those of the stages, if there is one."""


def people(params: ToyboxParams) -> dict[str, tuple[Toy, list[Item]]]:
    """Name of each evaluation subject -> the subject and its photos in order."""
    found = layouts.people(params.seed, params.dreambench_subjects, params.dreambench_photos)
    return {name: (photos[0][0], photos) for name, photos in found.items()}


def attributes(rows: Sequence[Mapping[str, Any]], subjects: Mapping[str, Toy], judge: Judge) -> dict[str, Any]:
    """Fraction of images in which the judge sees each expected attribute; None if no image asks for it.

    rows: of the generations table. `kept`: family, colour and pattern of the subject, over the images whose prompt
    leaves them visible (no other shape for the family, no style for colour and pattern). `followed`: scene, style,
    accessory and shape, over the images whose prompt names one. A can-shaped mug and a can are one shape under two
    names: the shape seen is the one the judge reports if any, else that of the family.
    """
    images = torch.from_numpy(np.stack([picture(row) for row in rows]))
    seen = {name: [ATTRIBUTES[name][i] for i in found.tolist()] for name, found in verdicts(judge, images)[0].items()}
    seen["shape"] = [
        family if shape == "own" else shape for shape, family in zip(seen["shape"], seen["family"], strict=True)
    ]
    hits: dict[str, list[bool]] = {}
    for number, row in enumerate(rows):
        subject, answer = subjects[name_of(row["subject_id"])], asked(row["prompt"])
        wanted = {
            "scene": answer.scene,
            "style": answer.style,
            "dress": answer.accessory,
            "shape": answer.shape,
            "family": None if answer.shape else subject.family,
            "colour": None if answer.style else subject.colours[0],
            "pattern": None if answer.style else subject.pattern,
        }
        for name, value in wanted.items():
            if value is not None:
                hits.setdefault(name, []).append(seen[name][number] == value)
    share = {name: round(float(np.mean(hits[name])), 4) if name in hits else None for name in ATTRIBUTES}
    return {
        "kept": {name: share[name] for name in ("family", "colour", "pattern")},
        "followed": {
            "scene": share["scene"],
            "style": share["style"],
            "accessory": share["dress"],
            "shape": share["shape"],
        },
    }


def cut_out(image: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """The subject on white, float [SIDE, SIDE, 3] in 0..1; None if the mask is empty. image: uint8 [H, W, 3]."""
    if not mask.any():
        return None
    square = on_white(Image.fromarray(image), mask, margin=0.05).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(square, dtype=np.float32) / 255


def nearest_azimuth(cut: np.ndarray, renders: np.ndarray) -> float:
    """Azimuth of the render closest to `cut` by mean squared error; renders: [elevations, azimuths, S, S, 3]."""
    distance = ((renders - cut) ** 2).mean(axis=(2, 3, 4))
    return float(AZIMUTHS[distance.min(axis=0).argmin()])


def renders_of(subject: Toy) -> np.ndarray:
    """Cut-outs of the plain subject from all directions, [len(ELEVATIONS), len(AZIMUTHS), SIDE, SIDE, 3]."""
    views = [View(float(azimuth), elevation) for elevation in ELEVATIONS for azimuth in AZIMUTHS]
    rendered = render([(subject, view, Look(BLANK)) for view in views])
    pairs = zip(rendered.images.numpy(), rendered.subject_masks.numpy(), strict=True)
    cuts = [cut_out(image, mask) for image, mask in pairs]
    return np.stack([cut for cut in cuts if cut is not None]).reshape(len(ELEVATIONS), len(AZIMUTHS), SIDE, SIDE, 3)


def leakage(read: Iterable[tuple[str, float, float]], azimuths: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Pose leakage: how often an image has the pose of its reference photo, and how often by chance.

    read: (subject, azimuth read from the image, azimuth of the reference), degrees. azimuths: of all photos of each
    subject. Chance: the same images against every photo of their subject, reference or not, so that a model that
    always generates frontal views has no leakage.
    """
    hits, chance = [], []
    for subject, found, shown in read:
        hits.append(apart(found, shown) <= NEAR)
        chance.append(np.mean([apart(found, other) <= NEAR for other in azimuths[subject]]))
    return {"same_pose": round(float(np.mean(hits)), 4), "chance": round(float(np.mean(chance)), 4)}


def poses(
    rows: Sequence[Mapping[str, Any]], world: Mapping[str, tuple[Toy, list[Item]]], judge: Judge
) -> dict[str, Any]:
    """`leakage` over the subjects whose pose can be read from their own photos; all None if there are none."""
    renders: dict[str, np.ndarray] = {}
    right: list[float] = []
    for name, (subject, photos) in world.items():
        own, rendered = renders_of(subject), render(photos)
        cuts = [cut_out(i, m) for i, m in zip(rendered.images.numpy(), rendered.subject_masks.numpy(), strict=True)]
        found = [
            apart(nearest_azimuth(cut, own), view.azimuth) <= NEAR
            for cut, (_, view, _) in zip(cuts, photos, strict=True)
            if cut is not None
        ]
        if np.mean(found) >= READABLE:
            renders[name] = own
            right.append(float(np.mean(found)))
    shown = [row for row in rows if readable(row, renders)]
    if not shown:
        return {"subjects": len(renders), "pictures": 0, "read_right": None, "same_pose": None, "chance": None}
    images = np.stack([picture(row) for row in shown])
    masks = verdicts(judge, torch.from_numpy(images))[1].numpy()
    azimuths = {name: [view.azimuth for _, view, _ in photos] for name, (_, photos) in world.items()}
    read = []
    for row, image, mask in zip(shown, images, masks, strict=True):
        name, cut = name_of(row["subject_id"]), cut_out(image, mask)
        if cut is not None:
            reference = azimuths[name][int(row["reference"].rsplit("/", 1)[1])]
            read.append((name, nearest_azimuth(cut, renders[name]), reference))
    known = {"subjects": len(renders), "pictures": len(read), "read_right": round(float(np.mean(right)), 4)}
    return known | leakage(read, azimuths)


def readable(row: Mapping[str, Any], renders: Mapping[str, np.ndarray]) -> bool:
    """Whether an image shows the plain subject in its own shape, and the subject's pose can be read."""
    answer = asked(row["prompt"])
    return name_of(row["subject_id"]) in renders and not (answer.style or answer.shape or answer.accessory)


def name_of(subject_id: str) -> str:
    """The subject's own name: the last part of its id."""
    return subject_id.rsplit("/", 1)[-1]


def picture(row: Mapping[str, Any]) -> np.ndarray:
    """The image of a row of the generations table, uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB"))


def change_outside(
    rows: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]], judge: Judge
) -> dict[str, float | None]:
    """How much images differ from those of the prompt alone, from the same noise, where neither shows the subject.

    rows, plain: of the generations table. `change`: mean absolute difference of the pixels, 0..1, outside of both
    subjects' masks and MARGIN pixels around them; None without an image in common.
    """
    of_plain = {key_of(row): row for row in plain}
    pairs = [(row, of_plain[key_of(row)]) for row in rows if key_of(row) in of_plain]
    if not pairs:
        return {"change": None}
    found = []
    mine, theirs = (np.stack([picture(pair[side]) for pair in pairs]) for side in (0, 1))
    masks = [verdicts(judge, torch.from_numpy(images))[1].numpy() for images in (mine, theirs)]
    for a, b, *shown in zip(mine, theirs, *masks, strict=True):
        outside = ~grown(shown[0] | shown[1], MARGIN)
        if outside.any():
            found.append(float(np.abs(a.astype(np.float64) - b)[outside].mean() / 255))
    return {"change": round(float(np.mean(found)), 4) if found else None}


def overlap(maps: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], judge: Judge) -> dict[str, float]:
    """Step -> mean overlap of the location mask of that step with the finished subject; empty without maps.

    maps: rows of the location_masks table. rows: of the generations table. The overlap is the sum of the cells' minima
    over that of their maxima, 0..1: intersection over union where both are 0 or 1. The finished subject is the judge's
    mask, as the share of each cell that it covers. Images without a subject in them are left out.
    """
    named = {tuple(row[name] for name in IMAGE): row for row in rows}
    images = list(dict.fromkeys(tuple(row[name] for name in IMAGE) for row in maps))
    if not images:
        return {}
    seen = verdicts(judge, torch.from_numpy(np.stack([picture(named[image]) for image in images])))[1]
    finished = dict(zip(images, seen, strict=True))
    found: dict[int, list[float]] = {}
    for row in maps:
        mask = finished[tuple(row[name] for name in IMAGE)]
        if mask.any():
            size = row["height"], row["width"]
            cells = torch.nn.functional.adaptive_avg_pool2d(mask[None].double(), size)[0].numpy()
            values = np.frombuffer(row["map"], dtype=np.uint8).reshape(size) / 255
            found.setdefault(row["step"], []).append(np.minimum(cells, values).sum() / np.maximum(cells, values).sum())
    return {str(step): round(float(np.mean(values)), 4) for step, values in sorted(found.items())}


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A mask, bool [H, W], and what lies within so many pixels of it, up or sideways."""
    side = 2 * pixels + 1
    return torch.nn.functional.max_pool2d(torch.from_numpy(mask)[None].float(), side, 1, pixels)[0].numpy() > 0


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two methods' images of one subject, prompt and noise have in common."""
    return row["subject_id"], row["prompt_id"], row["index"], row["seed"]


def measure(data: Path, params: ToyboxParams) -> dict[str, Any]:
    """All metrics over the model's images of single subjects, under `data`."""
    world, judge = people(params), load_judge(TOYS)
    rows = single(data / "generate", MODEL)
    subjects = {name: subject for name, (subject, _) in world.items()}
    found = attributes(rows, subjects, judge) | {"pose": poses(rows, world, judge)}
    plain, location = data / PLAIN, data / "location"
    if plain.is_dir():
        found["outside"] = change_outside(rows, single(plain, PROMPT_ONLY), judge)
    if (location / "summary.json").is_file():
        found["overlap"] = overlap(list(tables.rows(location, "location_masks")), rows, judge)
    return found


def single(folder: Path, method: str) -> list[dict[str, Any]]:
    """A method's images of single subjects: rows of the generations table in `folder`."""
    return [row for row in tables.rows(folder, "generations") if row["method"] == method and row["partner"] is None]


def main(words: Sequence[str]) -> None:
    parser = Parser(prog="python -m experiments.truth", description=__doc__)
    shared_options(parser)
    found = read_params(parser.parse_args(words))
    torch.set_num_threads(found.run.threads)
    measured = measure(found.data, found.section("toybox", ToyboxParams))
    write_json(found.data / "truth" / "metrics.json", measured)
    for name, values in measured.items():
        print(f"truth: {name} " + ", ".join(f"{key} {value}" for key, value in values.items()))


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
