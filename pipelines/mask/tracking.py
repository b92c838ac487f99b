"""Masks of a video's frames: found where the detector is surest, followed to the others, found again where lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field

from model.backbones.grounded_sam import Cut, Detection
from model.backbones.video_sam import Followed, PreparedFrame, VideoSam
from pipelines.mask.quality import iou
from pipelines.photos.videos import split_frame
from runtime.params import Section

Method = Literal["annotated", "grounded_sam", "tracked", "redetected"]
"""Where a mask is from, as the column `method` of `masks` has it."""


class TrackingParams(Section):
    """How a subject is followed through a video, and when it counts as lost; params.yaml gives the reasons."""

    looks: int = Field(ge=1)  # frames in which the detector looks for the subject first
    min_object: float = Field(ge=0, le=1)  # probability that the subject is in the frame
    max_area_change: float = Field(ge=1)  # factor between the areas of the mask and of the one before it
    min_overlap: float = Field(ge=0, le=1)  # IoU with the mask before it


@dataclass(frozen=True)
class MaskResult:
    """What became of a frame: a mask, or why there is none.

    Attributes:
        method: where the mask is from; without one, what was tried last.
        found: the detector's box in this frame, if it looked and found one; None where the subject was tracked.
        cut: the mask; None if there is none.
        presence: of a tracked subject, the probability that it is in the frame, 0..1.
        lost: why tracking did not hold; None if it did, or was not tried.
    """

    method: Method
    found: Detection | None = None
    cut: Cut | None = None
    presence: float | None = None
    lost: str | None = None


class VideoFrames(Protocol):
    """Frames of a video, known by their number 0.. in the order of time.

    `show`, `follow` and `forget` are those of `VideoMemory`.
    """

    looked: Sequence[int]
    """The frames in which the detector looks first."""

    def __len__(self) -> int: ...

    def detect(self, numbers: Sequence[int]) -> list[Detection | None]:
        """The best box in each frame."""

    def cut(self, number: int, found: Detection) -> Cut:
        """The mask of a box's content."""

    def show(self, number: int, mask: np.ndarray) -> None: ...

    def follow(self, number: int, backwards: bool) -> Followed: ...

    def forget(self, number: int) -> None: ...


class PreparedVideo:
    """`VideoFrames` of prepared frames, on the device.

    Args:
        again: prepares a frame for the detector that was not prepared for it.
    """

    def __init__(
        self, models: VideoSam, frames: Sequence[PreparedFrame], phrase: str, again: Callable[[int], PreparedFrame]
    ) -> None:
        self._models, self._phrase, self._again = models, phrase, again
        self._frames = [PreparedFrame(frame.size, frame.sam, None) for frame in frames]
        self._ready = {number: frame for number, frame in enumerate(frames) if frame.detector is not None}
        self.looked: Sequence[int] = tuple(self._ready)
        memory = models.memory(self._frames)
        self.show, self.follow, self.forget = memory.show, memory.follow, memory.forget

    def __len__(self) -> int:
        return len(self._frames)

    def detect(self, numbers: Sequence[int]) -> list[Detection | None]:
        """See `VideoFrames.detect`; the detector's input, four times that of SAM 2, is released."""
        frames = [self._ready.pop(number) if number in self._ready else self._again(number) for number in numbers]
        return self._models.detect(frames, self._phrase)

    def cut(self, number: int, found: Detection) -> Cut:
        """See `VideoFrames.cut`."""
        return self._models.cut(self._frames[number], found.box)


def videos(frames: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Return the positions of the rows that are frames of one subject in one video, in the order of time, each video
    with two or more; the rows may have any order."""
    groups: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for position, frame in enumerate(frames):
        if (parts := split_frame(frame["path"])) is not None:
            video, time = parts
            groups.setdefault((frame["subject_id"], video), []).append((float(time.removeprefix("~")), position))
    return [[position for _, position in sorted(group)] for group in groups.values() if len(group) > 1]


def evenly(count: int, most: int) -> list[int]:
    """Return the middles of `most` equal parts of 0..count - 1; all of them if there are no more."""
    parts = min(count, most)
    return [(2 * part + 1) * count // (2 * parts) for part in range(parts)]


def track(video: VideoFrames, params: TrackingParams, min_detection: float) -> Iterator[tuple[int, MaskResult]]:
    """Yield each frame's number and result, in the order in which they are known.

    The subject is followed from the frame where the detector is surest, to the end and then to the beginning. If no
    frame that was looked at first shows it, the others are looked at too; if none does, nothing can be followed. Where
    it is lost, the frame's mask is forgotten, and the detector looks there; what it finds is shown to the memory.

    Args:
        min_detection: score of a detection that counts.
    """
    found: dict[int, Detection | None] = {}
    cuts: dict[int, Cut] = {}

    def look(numbers: Sequence[int]) -> None:
        unseen = [number for number in numbers if number not in found]
        for first in range(0, len(unseen), params.looks):
            some = unseen[first : first + params.looks]
            found.update(zip(some, video.detect(some), strict=True))

    def cut(number: int) -> Cut | None:
        one = found[number]
        if number not in cuts and one is not None and one.score >= min_detection:
            cuts[number] = video.cut(number, one)
        return cuts.get(number)

    def surest() -> tuple[int, np.ndarray] | None:
        scores = {number: one.score for number, one in found.items() if one is not None}
        for number in sorted(scores, key=lambda number: (-scores[number], number)):
            if (made := cut(number)) is not None and made.mask.any():
                return number, made.mask
        return None

    look(video.looked)
    if (start := surest()) is None:
        look(range(len(video)))
        start = surest()
    if start is None:
        for number in range(len(video)):
            yield number, MaskResult("grounded_sam", found[number], cuts.get(number))
        return
    first, mask = start
    video.show(first, mask)
    yield first, MaskResult("grounded_sam", found[first], cuts[first])
    for backwards, numbers in ((False, range(first + 1, len(video))), (True, range(first - 1, -1, -1))):
        before = mask
        for number in numbers:
            followed = video.follow(number, backwards)
            lost = why_lost(followed, before, params)
            if lost is None:
                before = followed.mask
                yield number, MaskResult("tracked", None, Cut(followed.mask, followed.score), followed.presence)
                continue
            video.forget(number)
            look([number])
            again = cut(number)
            if again is not None and again.mask.any():
                before = again.mask
                video.show(number, before)
            yield number, MaskResult("redetected", found[number], again, lost=lost)


def why_lost(followed: Followed, before: np.ndarray, params: TrackingParams) -> str | None:
    """Return why a mask is not that of the subject, whose mask in the frame before is `before`; None if it is."""
    mask = followed.mask
    if followed.presence < params.min_object:
        return f"object score {followed.presence:.2f}"
    if not mask.any():
        return "no pixel"
    if mask.shape != before.shape:
        return "another size of the frame"
    areas = sorted((int(mask.sum()), int(before.sum())))
    if areas[1] > params.max_area_change * areas[0]:
        return f"area {mask.sum() / before.sum():.2f} times that before"
    if (overlap := iou(mask, before)) < params.min_overlap:
        return f"IoU {overlap:.2f} with the mask before"
    return None
