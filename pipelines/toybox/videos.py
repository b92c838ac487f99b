"""Videos of toys, each filmed in one turn around it, in the layout `video`: `<family>/<name>.mp4` (H.264).

`python -m pipelines.toybox.videos --out data/toybox-videos` renders them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.toybox.layouts import VIDEOS
from pipelines.toybox.rendering.march import View
from pipelines.toybox.world import FAMILIES, Item, render, sample_look, sample_subject, sample_view
from pipelines.toybox.writing import generator, name_of, rendered
from runtime.cli import Parser, guarded
from runtime.errors import UserError

RATE = 24
"""Frames a second."""


def main(words: Sequence[str]) -> None:
    """Write the videos.

    Raises:
        UserError: a number is out of range.
    """
    parser = Parser(prog="python -m pipelines.toybox.videos", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the videos; those that exist are kept")
    parser.add_argument("--videos", type=int, default=4, help="each of another toy (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=96, help="of a video, one turn (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="of both sides, px; even (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the toys (default: %(default)s)")
    options = parser.parse_args(words)
    for name, least in (("videos", 1), ("frames", 1), ("size", 16), ("seed", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} is {getattr(options, name)}; give at least {least}")
    if options.size % 2:
        raise UserError(f"--size is {options.size}, and H.264 halves the resolution of colours; give an even number")
    torch.set_num_threads(1)  # the renderer's tensors are small: more threads are only overhead
    for file in write_videos(options.out, options.seed, options.videos, options.frames, options.size):
        print(file, flush=True)


def write_videos(root: Path, seed: int, videos: int, frames: int, size: int) -> Iterator[Path]:
    """Write the videos that are missing, and yield the path of each; no held-out subjects."""
    for index in range(videos):
        file = root / FAMILIES[index % len(FAMILIES)] / f"{name_of(seed, VIDEOS, index, 8)}.mp4"
        if not file.exists():
            rng = generator(seed, VIDEOS, index)
            part = file.with_name(f".{file.name}.part")  # hidden: readers take no half video
            part.parent.mkdir(parents=True, exist_ok=True)
            write_video(part, images(turn(rng, FAMILIES[index % len(FAMILIES)], frames), size), size)
            part.replace(file)
        yield file


def turn(rng: np.random.Generator, family: str, frames: int) -> list[Item]:
    """The frames of a turn around one toy in one scene, in one light, by a hand that does not keep quite still."""
    subject, look = sample_subject(rng, family, kept=False), sample_look(rng)
    first = sample_view(rng, float(rng.uniform(-180, 180)))
    phase = rng.uniform(0, 2 * np.pi, 2)
    items: list[Item] = []
    for number in range(frames):
        angle = 2 * np.pi * number / frames
        view = View(
            azimuth=round((first.azimuth + np.degrees(angle) + 180) % 360 - 180, 4),
            elevation=round(25 + 10 * float(np.sin(angle + phase[0])), 4),
            roll=round(2 * float(np.sin(2 * angle + phase[1])), 4),
            size=first.size,
            position=first.position,
            light=first.light,
        )
        items.append((subject, view, look))
    return items


def images(items: list[Item], size: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the pictures [size, size, 3] of items."""
    for _, found in rendered([[item] for item in items], render, size, lambda done, total: None):
        yield from (photo.rgb for photo in found)


def write_video(file: Path, shown: Iterator[NDArray[np.uint8]], size: int) -> None:
    """Encode images as an MP4, in one thread: the same bytes on every machine with the same encoder."""
    with av.open(str(file), "w", format="mp4") as out:
        track = out.add_stream("libx264", rate=RATE, options={"crf": "16", "g": str(RATE), "threads": "1"})
        track.width, track.height, track.pix_fmt = size, size, "yuv420p"
        for number, rgb in enumerate(shown):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            out.mux(track.encode(frame))
        out.mux(track.encode())


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
