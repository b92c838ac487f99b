"""What the readers of turntable videos share: which captures are read, and which of their frames."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from pipelines.photos.roots import Root, SourceParams
from pipelines.sources.base import class_noun

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Subset:
    """Decides which captures of a set are read (`classes`, `min_quality`), and counts others of these classes."""

    def __init__(self, params: SourceParams) -> None:
        self._params = params
        self._classes = None if params.classes is None else {class_noun(name) for name in params.classes}
        self._left_out = Counter[str]()
        self._seen = 0

    def has_class(self, *names: str) -> bool:
        """Whether a class that goes by these names, as class nouns, is wanted."""
        return self._classes is None or not self._classes.isdisjoint(names)

    def takes(self, quality: float | None, present: bool) -> bool:
        """Whether a capture is read. quality: its score, the bigger the better; present: whether its files are."""
        self._seen += 1
        least, reason = self._params.min_quality, None
        if least is not None and (quality is None or not quality >= least):
            reason = f"below min_quality {least:g} or without a score"
        elif not present:
            reason = "not on disk"
        self._left_out[reason or ""] += 1
        return reason is None

    def frames(self, frames: Sequence[T]) -> Sequence[T]:
        """Return at most `views` frames of a capture, evenly spaced."""
        views = self._params.views
        if views is None or len(frames) <= views:
            return frames
        return [frames[number * len(frames) // views] for number in range(views)]

    def report(self, root: Root) -> None:
        """Log how many captures were left out, and why."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self._left_out.items()) if reason)
        if reasons:
            _log.warning("%s: of %d annotated captures are not read: %s", root.url, self._seen, reasons)
