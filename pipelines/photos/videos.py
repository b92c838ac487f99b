"""Frames of videos: chosen in one decoding by time, sharpness and change, and read again by their presentation time.

A frame is a file of its video: `mug/red.mp4/3.266667` is the frame of `mug/red.mp4` that is shown at 3.266667 s, and
`mug/red.mp4/~3.27` the one that is shown nearest to 3.27 s from the first frame, for times that others wrote down. It
is read as an upright BMP, whose pixels cost no compression, so that whatever reads photos reads frames too.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePosixPath
from typing import BinaryIO

import av
import numpy as np
from av.codec.context import Flags
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from pydantic import Field

from pipelines.photos.decode import DecodeError
from runtime.errors import one_line
from runtime.files import LFS_POINTER
from runtime.params import Section

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
_FRAME = re.compile(
    rf"(?P<video>.*(?:{'|'.join(map(re.escape, SUFFIXES))}))/(?P<time>-?\d+\.\d{{6}}|~\d+\.\d+)", re.IGNORECASE
)

# The first bytes of Matroska, and the types of the boxes that may come first in an MP4 or QuickTime file. The reader is
# chosen by them and by nothing else: FFmpeg would also take playlists, which name other files.
_EBML = b"\x1aE\xdf\xa3"
_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"})

# The same pixels on every machine: without these, swscale rounds as the CPU's instructions do.
_EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_UNSPECIFIED = 2  # colour matrix, ISO/IEC 23091-4
_HD = 720  # lines from which a video that does not name its colours is taken for BT.709, as players do

# Header of a BMP: file, then image, its rows from the top as the height is negative, three bytes a pixel.
_BMP = struct.Struct("<2sIIIIiiHHIIiiII")

_SIDE = 256  # px of the shorter side at which sharpness is measured, as curate.filters.sharpness_side
_THUMB = 16  # px of both sides at which change is measured: larger than noise and shake
# Seconds before a frame at which reading begins: a key frame may be shown after frames that need it.
_REACH = (0, 2, 10)
# Seconds that a frame may be shown from the time at which it is looked for; further away is another view.
_NEAR = Fraction(1, 10)


class VideoParams(Section):
    """Which frames of a video are taken; params.yaml gives the reason for each value."""

    frames: int = Field(ge=1, le=1000)  # of a video, one for each part of its time
    tries: int = Field(ge=1)  # frames of a part that are compared, of which the sharpest is taken
    min_change: float = Field(ge=0)  # mean difference to the last frame taken, grey values 0..255


@dataclass(frozen=True)
class Span:
    """A part of a video that gives one frame: `part` of `parts` of equal time between `start` and `end`.

    start, end: seconds from the first frame; None: as far as the video goes.
    """

    start: float | None = None
    end: float | None = None
    part: int = 0
    parts: int = 1


def is_video(name: str) -> bool:
    """Whether a file name has the suffix of a video."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def frame_path(video: str, time: str) -> str:
    """Return the path of a frame, as `split_frame` reads it."""
    return f"{video}/{time}"


def frame_near(video: str, seconds: float) -> str:
    """Return the path of the frame that is shown nearest to a time, counted from the first frame."""
    return f"{video}/~{max(seconds, 0.0):.6f}"


def split_frame(path: str) -> tuple[str, str] | None:
    """Return (path of the video, time) if `path` is that of a frame, else None."""
    found = _FRAME.fullmatch(path)
    return (found["video"], found["time"]) if found else None


def read_frame(stream: BinaryIO, time: str) -> bytes:
    """Return the frame at a time that `choose` gave, as the same bytes; at `~` and a time, the nearest one.

    Decoding starts at the last key frame before it, so the cost is that of a group of pictures at most.

    Raises:
        DecodeError: the video cannot be read, or has no such frame.
    """
    if time.startswith("~"):
        return _read_near(stream, Fraction(time[1:]))
    wanted = Fraction(time)
    for reach in _REACH:
        with _opened(stream) as (container, video), contextlib.suppress(av.error.FFmpegError):
            container.seek(round((wanted - reach) / _base(video)), stream=video)
            if (found := _frame_at(container, video, time)) is not None:
                return found
    with _opened(stream) as (container, video):  # where the index of the file is wrong, from the start
        if (found := _frame_at(container, video, time)) is not None:
            return found
    raise DecodeError("unreadable", f"the video has no frame at {time} s")


def _read_near(stream: BinaryIO, seconds: Fraction) -> bytes:
    """Return the frame that is shown nearest to a time from the first frame, the earlier of two.

    Raises:
        DecodeError: the video cannot be read, or shows none within _NEAR.
    """
    for reach in (*_REACH, None):
        with _opened(stream) as (container, video), contextlib.suppress(av.error.FFmpegError):
            wanted = seconds + (video.start_time or 0) * _base(video)
            if reach is not None:
                container.seek(round((wanted - reach) / _base(video)), stream=video)
            best: tuple[Fraction, VideoFrame] | None = None
            for pts, frame in _decoded(container, video):
                away = pts * _base(video) - wanted
                if best is None and away > 0 and reach is not None:
                    break  # an earlier frame may be nearer
                if best is None or abs(away) < best[0]:
                    best = abs(away), frame
                if away >= 0:
                    break
            if best is not None and best[0] <= _NEAR:
                return _bitmap(best[1])
    raise DecodeError("unreadable", f"the video shows no frame near {float(seconds):.3f} s")


def choose(
    stream: BinaryIO, span: Span, params: VideoParams, max_pixels: int | None = None
) -> Iterator[tuple[str, bytes] | DecodeError]:
    """Yield for each part of a span, in order, the time of its frame and the frame as bytes, or why there is none.

    Every frame of the span is decoded once and none is kept but the best of the part. That is the sharpest of `tries`
    frames that differ by `min_change` from the last one taken; if all look like it, the sharpest of all.

    Reasons: those of `decode_image` for the whole video; `no_frame` where it is shorter than the part begins, or has
    fewer frames than parts; `unreadable` where no frame of the part can be decoded.

    Args:
        stream: the video's file, seekable.
        span: `start`, `end` and `parts`; `part` is ignored.
        max_pixels: of a frame.
    """
    try:
        times, base = _times(stream, span, max_pixels)
    except DecodeError as error:
        yield from [error] * span.parts
        return
    if not times:
        until = "its end" if span.end is None else f"{span.end:g} s"
        yield from [DecodeError("no_frame", f"between {span.start or 0:g} s and {until}")] * span.parts
        return
    counts = np.bincount([_part(pts, times, span.parts) for pts in times], minlength=span.parts).tolist()
    taken: np.ndarray | None = None
    best: _Best | None = None
    open_part = seen = 0

    def closed(part: int) -> tuple[str, bytes] | DecodeError:
        if best is not None:
            try:
                return _time(best.pts, base), _bitmap(best.frame)
            except DecodeError as error:
                return error
        first, last = (float(_edge(at, times, span.parts) * base) for at in (part, part + 1))
        where = f"between {first:.3f} and {last:.3f} s"
        return DecodeError("unreadable", f"damaged {where}") if counts[part] else DecodeError("no_frame", where)

    with _opened(stream) as (container, video):
        if span.start:
            with contextlib.suppress(av.error.FFmpegError):  # then from the start
                container.seek(times[0] - round(_REACH[1] / base), stream=video)
        for pts, frame in _decoded(container, video):
            if pts > times[-1]:
                break
            part = _part(pts, times, span.parts)
            if pts < times[0] or part < open_part:
                continue
            while open_part < part:
                yield closed(open_part)
                taken = taken if best is None else best.thumb
                best, seen, open_part = None, 0, open_part + 1
            if seen % max(-(-counts[part] // params.tries), 1) == 0:
                best = _better(best, pts, frame, taken, params.min_change)
            seen += 1
    while open_part < span.parts:
        yield closed(open_part)
        best, open_part = None, open_part + 1


@dataclass(frozen=True)
class _Best:
    """The best frame of a part so far: whether it differs from the last one taken, its sharpness, its thumbnail."""

    pts: int
    frame: VideoFrame
    rank: tuple[bool, float]
    thumb: np.ndarray


def _better(
    best: _Best | None, pts: int, frame: VideoFrame, taken: np.ndarray | None, min_change: float
) -> _Best | None:
    """Return the better of two frames; `best` if the frame cannot be converted."""
    try:
        grey = _grey(frame)
    except (av.error.FFmpegError, ValueError):
        return best
    high, wide = (side // _THUMB for side in grey.shape)
    thumb = grey[: _THUMB * high, : _THUMB * wide].reshape(_THUMB, high, _THUMB, wide).mean(axis=(1, 3))
    changed = taken is None or float(np.abs(thumb - taken).mean()) >= min_change
    laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    rank = (changed, float(laplacian.var()))
    return _Best(pts, frame, rank, thumb) if best is None or rank > best.rank else best


def _times(stream: BinaryIO, span: Span, max_pixels: int | None) -> tuple[list[int], Fraction]:
    """Return when the frames of a span are shown, in order, in units of the time base, and that; nothing is decoded."""
    with _opened(stream) as (container, video):
        if max_pixels is not None and video.width * video.height > max_pixels:
            raise DecodeError("huge", f"{video.width} x {video.height} px, the limit is {max_pixels} pixels")
        base = _base(video)
        times = sorted(p.pts for p in _packets(container, video) if p.pts is not None and not p.is_discard)
        if not times:
            raise DecodeError("unreadable", "no frame in it can be read")
        first = times[0]
        low = first if span.start is None else first + span.start / base
        high = times[-1] if span.end is None else first + span.end / base
        return [pts for pts in times if low <= pts <= high], base


def _part(pts: int, times: list[int], parts: int) -> int:
    """Return the part of the span that a time is in, by time, not by number: frame rates vary."""
    return min(max(pts - times[0], 0) * parts // _length(times), parts - 1)


def _edge(part: int, times: list[int], parts: int) -> Fraction:
    return times[0] + Fraction(part * _length(times), parts)


def _length(times: list[int]) -> int:
    """Return how long a span is shown: the last frame as long as the mean one."""
    span = times[-1] - times[0]
    return span + max(span // max(len(times) - 1, 1), 1)


@contextlib.contextmanager
def _opened(stream: BinaryIO) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video and its video track; one thread decodes it, as workers share the machine's.

    Raises:
        DecodeError: it is no video, or its header is damaged.
    """
    stream.seek(0)
    head = stream.read(len(LFS_POINTER))
    stream.seek(0)
    if not head:
        raise DecodeError("empty", "0 bytes")
    if head == LFS_POINTER:
        raise DecodeError("unreadable", "a git-lfs pointer, not the file itself; run git lfs pull in its folder")
    if not (head.startswith(_EBML) or head[4:8] in _BOXES):
        raise DecodeError("unreadable", "not a video of a known format")
    kind = "matroska" if head.startswith(_EBML) else "mov"
    try:
        container = av.open(stream, "r", format=kind, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise DecodeError("unreadable", _reason(error)) from None
    with container:
        video = container.streams.best("video")
        if not isinstance(video, VideoStream) or not video.time_base:
            raise DecodeError("unreadable", "no track in it is a video of a known codec")
        video.codec_context.thread_count = 1
        video.codec_context.flags |= Flags.bitexact
        yield container, video


def _packets(container: InputContainer, video: VideoStream) -> Iterator[av.Packet]:
    """Yield the packets of a track until the file ends or is damaged beyond reading."""
    with contextlib.suppress(av.error.FFmpegError):
        yield from container.demux(video)


def _decoded(container: InputContainer, video: VideoStream) -> Iterator[tuple[int, VideoFrame]]:
    """Yield the frames of a track that can be decoded, with their time, as they are shown."""
    for packet in _packets(container, video):
        with contextlib.suppress(av.error.FFmpegError):  # a damaged packet; the next key frame is whole again
            for frame in packet.decode():
                if isinstance(frame, VideoFrame) and frame.pts is not None and not frame.is_corrupt:
                    yield frame.pts, frame


def _frame_at(container: InputContainer, video: VideoStream, time: str) -> bytes | None:
    """Return the frame at a time, if it follows; None once a later one is shown."""
    for pts, frame in _decoded(container, video):
        if _time(pts, _base(video)) == time:
            return _bitmap(frame)
        if pts * _base(video) > Fraction(time) + Fraction(1, 10**6):
            return None
    return None


def _base(video: VideoStream) -> Fraction:
    assert video.time_base is not None  # _opened
    return video.time_base


def _time(pts: int, base: Fraction) -> str:
    """Return a time in seconds, as paths have it; two frames are never within a microsecond."""
    return f"{float(pts * base):.6f}"


def _grey(frame: VideoFrame) -> np.ndarray:
    """Return the grey values 0..255 [h, w] float32 of a frame, its shorter side `_SIDE` px at most."""
    scale = min(1.0, _SIDE / min(frame.width, frame.height))
    size = [max(round(side * scale), _THUMB) for side in (frame.width, frame.height)]
    return _converted(frame, "gray", *size).astype(np.float32)


def _bitmap(frame: VideoFrame) -> bytes:
    """Return a frame as the bytes of an image file, upright.

    Raises:
        DecodeError: its pixel format cannot be converted.
    """
    try:
        pixels = np.rot90(_converted(frame, "bgr24", frame.width, frame.height), round(frame.rotation / 90) % 4)
    except (av.error.FFmpegError, ValueError) as error:
        raise DecodeError("unreadable", _reason(error)) from None
    height, width = pixels.shape[:2]
    rows = np.pad(pixels.reshape(height, 3 * width), ((0, 0), (0, -3 * width % 4)))  # of whole words
    header = _BMP.pack(b"BM", 54 + rows.size, 0, 54, 40, width, -height, 1, 24, 0, rows.size, 0, 0, 0, 0)
    return b"".join((header, rows.data))


def _converted(frame: VideoFrame, kind: str, width: int, height: int) -> np.ndarray:
    """Return a frame as uint8 [height, width] or [height, width, 3], in sRGB's range by its own colour matrix."""
    matrix = frame.colorspace
    if matrix == _UNSPECIFIED:
        matrix = Colorspace.ITU709 if min(frame.width, frame.height) >= _HD else Colorspace.ITU601
    return (
        VideoReformatter()
        .reformat(
            frame,
            width,
            height,
            kind,
            src_colorspace=matrix,
            dst_colorspace=Colorspace.ITU601,
            interpolation=_EXACT,
            src_color_range=frame.color_range or ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )
        .to_ndarray()
    )


def _reason(error: Exception) -> str:
    """Return what FFmpeg says, without the name of the file, which tables do not depend on."""
    return str(getattr(error, "strerror", None) or one_line(error))
