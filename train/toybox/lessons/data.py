"""Training images of the small backbones, rendered once into memory-mapped arrays.

A set is a folder in the world's work folder: `images.npy` uint8 [N, 64, 64, 3], `regions.npy` uint8 [N, 64, 64] and
`attributes.npy` int16 [N, attributes]. An image's content is a pure function of (set, index), so captions need no file.
"""

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import pipelines.toybox
from runtime.cli import Parser, guarded
from runtime.errors import UserError
from train.toybox.lessons.registry import TOYS, WORLDS, world_option
from train.toybox.lessons.worlds import LessonSet, World

SIZE = 64
"""Side of every image, pixels."""

BLOCK = 480
"""Images rendered per unit of progress; a multiple of the renderer's own chunk."""

BACKGROUND, SUBJECT, WORN = 0, 1, 2
"""Values of `regions`: the subject is 1, what it wears 2."""


@dataclass(frozen=True)
class Pictures:
    """One rendered set, memory-mapped.

    images: uint8 [N, 64, 64, 3], sRGB. regions: uint8 [N, 64, 64], see `SUBJECT`. attributes: int16
    [N, len(world.attributes)], indices into the names of the world's attributes. digest: SHA-256 of the images.
    """

    world: World
    spec: LessonSet
    images: NDArray[np.uint8]
    regions: NDArray[np.uint8]
    attributes: NDArray[np.int16]
    digest: str

    def __len__(self) -> int:
        return len(self.images)

    def column(self, name: str) -> NDArray[np.int16]:
        """One attribute of every image, int16 [N]."""
        return self.world.column(self.attributes, name)

    def captions(self, index: int) -> list[str]:
        """Every caption of an image: templates x details, details varying fastest."""
        return self.spec.captions(index)


def open_set(world: World, name: str) -> Pictures:
    """Memory-map a set; raises UserError if it is not fully rendered."""
    spec, folder = world.sets[name], world.work / name
    command = f"`python -m train.toybox.lessons.data{world_option(world)}`"
    done = folder / "set.json"
    if not done.exists():
        raise UserError(f"{done} is missing; render the images with {command}")
    card = json.loads(done.read_text())
    if card["spec"] != asdict(spec):
        raise UserError(f"{done} describes a different set '{name}'; delete {folder} and run {command}")
    images, regions, attributes = (
        np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("images", "regions", "attributes")
    )
    return Pictures(world, spec, images, regions, attributes, card["sha256"])


def batch(
    sets: list[Pictures], count: int, rng: np.random.Generator, shares: Sequence[float] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int16]]:
    """Images, regions and attributes of random images from several sets, mirrored at random.

    shares: probability of each set, summing to 1; by default all images are equally likely.
    """
    sizes = np.array([len(one) for one in sets])
    chosen = rng.multinomial(count, sizes / sizes.sum() if shares is None else shares)
    parts = []
    for one, size in zip(sets, chosen, strict=True):
        rows = np.sort(rng.integers(len(one), size=size))
        parts.append((one.images[rows], one.regions[rows], one.attributes[rows]))
    images, regions, attributes = (np.concatenate(column) for column in zip(*parts, strict=True))
    mirrored = rng.random(count) < 0.5
    images[mirrored] = images[mirrored, :, ::-1]
    regions[mirrored] = regions[mirrored, :, ::-1]
    return images, regions, attributes


def renderer_digest() -> str:
    """SHA-256 of the renderer's sources, to identify the version that rendered a set."""
    sources = sorted(Path(pipelines.toybox.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an .npy file as a whole or not at all, also where two trainings compute the same one at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npy")
    np.save(temporary, array)
    temporary.replace(path)


HIDDEN_PATTERN = 0.05
"""A pattern covering a smaller fraction of the visible subject is hidden: behind a scarf, or on the far side."""

DIFFERENT = 16
"""Minimum difference, in levels of 255, of a pixel that shows the pattern's colour."""


def pattern_shares(pictures: Pictures) -> NDArray[np.float32]:
    """Fraction of the visible subject that the pattern covers in each image, [N]: the pixels that change without it.

    Computed once and stored beside the set.
    """
    path = pictures.world.work / pictures.spec.name / "pattern_shares.npy"
    if not path.exists():
        shares = []
        for start in range(0, len(pictures), BLOCK):
            rows = range(start, min(start + BLOCK, len(pictures)))
            items = [pictures.spec.item(index) for index in rows]
            plain = [(replace(subject, pattern="plain"), view, look) for subject, view, look in items]
            gap = np.abs(
                pictures.images[start : rows.stop].astype(np.int16)
                - pictures.world.render(plain, SIZE, "cpu").images.numpy()
            )
            subject = pictures.regions[start : rows.stop] == SUBJECT
            covered = ((gap.max(3) > DIFFERENT) & subject).sum((1, 2))
            shares.append((covered / np.maximum(subject.sum((1, 2)), 1)).astype(np.float32))
        save_array(path, np.concatenate(shares))
    found: NDArray[np.float32] = np.load(path)
    return found


def seen(pictures: Pictures) -> NDArray[np.bool_]:
    """`visible` of a set's attributes, without the pattern and its colour where the pattern is hidden."""
    shown = pictures.world.visible(np.asarray(pictures.attributes))
    names = list(pictures.world.attributes)
    if "pattern" not in names:
        return shown
    patterned = pictures.column("pattern") != pictures.world.attributes["pattern"].index("plain")
    hidden = patterned & (pattern_shares(pictures) < HIDDEN_PATTERN)
    shown[np.ix_(hidden, [names.index("pattern"), names.index("second")])] = False
    return shown


def prepare(world: World, name: str, processes: int = 2) -> None:
    """Render a set, resuming where a killed run stopped; a finished set is left as is."""
    spec = world.sets[name]
    folder = world.work / name
    if (folder / "set.json").exists():
        card = json.loads((folder / "set.json").read_text())
        if card["spec"] == asdict(spec):
            if card["renderer"] != renderer_digest():
                print(f"{spec.name}: kept, although pipelines/toybox has changed; delete {folder} to render it again")
            return
        raise UserError(f"{folder} contains a different set '{spec.name}'; delete it and run again")
    (folder / "done").mkdir(parents=True, exist_ok=True)
    count = len(spec)
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        "images": ((count, SIZE, SIZE, 3), np.uint8),
        "regions": ((count, SIZE, SIZE), np.uint8),
        "attributes": ((count, len(world.attributes)), np.int16),
    }
    for part, (shape, kind) in shapes.items():
        if not (folder / f"{part}.npy").exists():
            np.lib.format.open_memmap(folder / f"{part}.npy", "w+", kind, shape).flush()
    todo = [start for start in range(0, count, BLOCK) if not (folder / "done" / str(start)).exists()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started, jobs = time.monotonic(), [(world, name, start, device) for start in todo]
    for finished, _ in enumerate(_each(jobs, 1 if device == "cuda" else processes), 1):
        if finished % 10 == 0 or finished == len(todo):
            rate = finished * BLOCK / (time.monotonic() - started)
            print(f"{spec.name}: block {finished} of {len(todo)}, {rate:.0f} images/s", flush=True)
    digest = hashlib.sha256(np.load(folder / "images.npy", mmap_mode="r").tobytes()).hexdigest()
    card = {"spec": asdict(spec), "sha256": digest, "renderer": renderer_digest()}
    temporary = folder / "set.json.tmp"
    temporary.write_text(json.dumps(card, indent=1) + "\n")
    temporary.replace(folder / "set.json")


Job = tuple[World, str, int, str]


def _each(jobs: list[Job], processes: int) -> Iterator[None]:
    if processes == 1 or len(jobs) < 2:
        yield from map(_block, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.imap_unordered(_block, jobs)


def _block(job: Job) -> None:
    """Render one block into its slice of the arrays, then mark it done."""
    world, name, start, device = job
    spec, folder = world.sets[name], world.work / name
    rows = slice(start, min(start + BLOCK, len(spec)))
    items = [spec.item(index) for index in range(rows.start, rows.stop)]
    result = world.render(items, SIZE, device)
    regions = torch.where(result.subject_masks, SUBJECT, torch.where(result.masks, WORN, BACKGROUND)).to(torch.uint8)
    parts = {
        "images": result.images.cpu().numpy(),
        "regions": regions.cpu().numpy(),
        "attributes": np.array([world.row(item) for item in items], np.int16),
    }
    for part, values in parts.items():
        target = np.load(folder / f"{part}.npy", mmap_mode="r+")
        target[rows] = values
        target.flush()
    (folder / "done" / str(start)).touch()


def main(words: Sequence[str]) -> None:
    parser = Parser(description="Render the training images of the small backbones.")
    parser.add_argument("sets", nargs="*", help="some of the world's sets (default: all)")
    parser.add_argument("--world", choices=list(WORLDS), default=TOYS.name, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(words)
    torch.set_num_threads(1)  # the renderer's tensors are small: threads would wait for one another most of the time
    world = WORLDS[options.world]
    for name in options.sets or world.sets:
        if name not in world.sets:
            raise UserError(f"there is no set '{name}'; choose from {', '.join(world.sets)}")
        prepare(world, name, options.processes)


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
