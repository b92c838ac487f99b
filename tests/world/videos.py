"""Videos, encoded by PyAV, and faults in them."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

# tkhd's matrix (ISO/IEC 14496-12) for each angle that players turn a video by, clockwise.
_MATRICES = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def video(
    images: Iterable[Image.Image],
    times: Sequence[float] | None = None,
    kind: str = "mp4",
    codec: str = "mpeg4",
    rate: int = 10,
    pixels: str = "yuv420p",
    **options: str,
) -> bytes:
    """A video of images, shown at `times` (seconds) or `rate` a second."""
    faststart = {"movflags": "faststart"} if kind in ("mp4", "mov") else {}  # reads the file again, by its name
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "video"
        with av.open(str(file), "w", format=kind, options=faststart) as out:
            track = None
            for number, image in enumerate(images):
                if track is None:
                    track = out.add_stream(codec, rate=rate, options=options)
                    track.width, track.height = image.size
                    track.pix_fmt = pixels
                    track.codec_context.time_base = Fraction(1, 1000)
                frame = av.VideoFrame.from_ndarray(np.asarray(image.convert("RGB")), format="rgb24")
                frame.time_base = Fraction(1, 1000)
                frame.pts = round(1000 * (number / rate if times is None else times[number]))
                out.mux(track.encode(frame))
            if track is not None:
                out.mux(track.encode())
        return file.read_bytes()


def rotated(data: bytes, degrees: int) -> bytes:
    """An MP4 that players turn clockwise, as phones write those that they held upright."""
    at = data.index(b"tkhd") + 4 + 40  # version and flags, times, ids, duration, layer, volume
    a, b, c, d = (value << 16 for value in _MATRICES[degrees])
    return data[:at] + struct.pack(">iiiiiiiii", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


def damaged(data: bytes, start: float, end: float) -> bytes:
    """A file with the bytes from one fraction of its length to another overwritten."""
    first, last = int(start * len(data)), int(end * len(data))
    return data[:first] + bytes(last - first) + data[last:]
