"""Part that measures the choice of frames: its overhead over PyAV's own decoding of the same video, and the cost of
reading a frame again."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from benchmarks.data.setting import DataSetting
from benchmarks.measure import Line, ratio
from pipelines.photos.decode import DecodeError
from pipelines.photos.videos import Span, choose, read_frame

RATE = 30
"""Frames a second, and frames between key frames: those of phones."""
BITS = 0.27
"""Of a pixel: 17 Mbit/s at 1080p."""


def video(setting: DataSetting) -> Iterator[Line]:
    """Decoding a video and choosing its frames vs decoding it by PyAV, in one thread both; then frames read again."""
    sizes, params = setting.sizes, setting.curate.video
    file = drawn(sizes.work, sizes.photos, (sizes.side, sizes.side * 9 // 16 // 2 * 2))
    span = Span(parts=params.frames)

    def ours() -> list[tuple[str, bytes] | DecodeError]:
        with file.open("rb") as stream:
            return list(choose(stream, span, params))

    def plain() -> None:
        with av.open(str(file)) as container:
            track = container.streams.video[0]
            track.codec_context.thread_count = 1
            for _ in container.decode(track):
                pass

    yield ratio("video: choose over decode", ours, plain, sizes.photos, "frame", 0.8, sizes.repeats)
    chosen = [found[0] for found in ours() if not isinstance(found, DecodeError)]

    def again() -> None:
        with file.open("rb") as stream:
            for time in chosen:
                read_frame(stream, time)

    yield ratio("video: frames read again over decode", again, plain, sizes.photos, "frame", 0.0, sizes.repeats)


def drawn(work: Path, frames: int, size: tuple[int, int]) -> Path:
    """Return a synthetic video, encoded once: a view that moves over a pattern, with the noise of a sensor."""
    file = work / f"video-{frames}-{size[0]}x{size[1]}.mp4"
    if not file.exists():
        rng = np.random.default_rng(0)
        (width, height), room = size, 2 * frames
        coarse = Image.fromarray(rng.integers(40, 216, (9, 16, 3), dtype=np.uint8))
        wide = np.asarray(coarse.resize((width + room, height), Image.Resampling.BICUBIC), dtype=np.int16)
        ground = wide + rng.normal(0, 6, (height, width + room, 1)).astype(np.int16)
        part = file.with_suffix(".part")
        with av.open(str(part), "w", format="mp4") as out:
            track = out.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "g": str(RATE)})
            track.bit_rate = int(BITS * width * height * RATE)
            track.width, track.height, track.pix_fmt = width, height, "yuv420p"
            for number in range(frames):
                noise = rng.integers(-6, 7, (height, width, 1), dtype=np.int16)
                pixels = (ground[:, 2 * number : 2 * number + width] + noise).clip(0, 255).astype(np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, RATE)
                out.mux(track.encode(frame))
            out.mux(track.encode())
        part.replace(file)
    return file
