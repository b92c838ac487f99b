"""Videos of subjects: `<root>/<class noun>/<video>`, one subject a video, or a list of segments.

With `segments.csv` at the root (columns video, class_noun; optional: start, end, subject, caption) the videos may lie
anywhere below it, and a row is a subject's part of a video: `start` and `end` in seconds or as `m:ss`. Rows of one
subject are its views; without a subject, the video's name is it. Optional at the root: `captions.csv`.

A subject has one photo per segment here; curate takes several frames of each.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import PurePosixPath

from pipelines.photos.listings import csv_rows
from pipelines.photos.roots import Root, SourceParams, is_hidden
from pipelines.photos.videos import SUFFIXES, Span, is_video
from pipelines.sources.base import (
    Photo,
    Prompt,
    Subject,
    caption_key,
    class_noun,
    is_image,
    named_frames,
    read_captions,
)
from runtime.errors import UserError

SEGMENTS = "segments.csv"
_COLUMNS = ("video", "class_noun", "start?", "end?", "subject?", "caption?")
_EXPECTED = "<class noun>/"

_log = logging.getLogger(__name__)


class Video:
    """Reader of the video layout.

    Raises:
        UserError: the root is missing or empty, a video is in no class folder, or a row of the list is malformed.
    """

    def __init__(self, params: SourceParams) -> None:
        self._params = params
        self._root = Root(params.root)

    def subjects(self) -> Iterator[Subject]:
        """Yield one subject per video, or per subject of the list."""
        return self._listed() if self._root.exists(SEGMENTS) else self._by_folder()

    def prompts(self) -> Iterator[Prompt]:
        """Yield nothing: this layout has no prompts."""
        return iter(())

    def _by_folder(self) -> Iterator[Subject]:
        captions = read_captions(self._root)
        hint = f"move it to {_EXPECTED}, or name it in {SEGMENTS}"
        for name in self._videos("", below=False):
            raise UserError(f"video '{self._root.name(name)}' is in no class folder; {hint}")
        classes = [name for name in self._root.folders() if not is_hidden(name)]
        if not classes:
            raise UserError(
                f"'{self._root.url}' has no folders; put videos into {_EXPECTED} there, or write {SEGMENTS}"
            )
        for folder in classes:
            if "\ufffd" in folder or not class_noun(folder):
                fault = "is not UTF-8" if "\ufffd" in folder else "has no letter"
                raise UserError(f"folder '{self._root.name(folder)}' {fault}, so it is no class noun; rename it")
            for inside in self._root.folders(folder):
                for name in self._videos(f"{folder}/{inside}"):
                    raise UserError(f"video '{self._root.name(name)}' lies deeper than {_EXPECTED}; {hint}")
            for last, name in named_frames(self._root.files(folder)).items():
                subject_id, path = f"{self._params.name}/{folder}/{last}", f"{folder}/{name}"
                photo = Photo(f"{subject_id}/{last}", path, caption=captions.get(caption_key(path)), span=Span())
                if not is_video(name):
                    photo = _not_a_video(f"{subject_id}/0", path)
                yield Subject(subject_id, self._params.name, class_noun(folder), self._params.split, (photo,))

    def _listed(self) -> Iterator[Subject]:
        captions = read_captions(self._root)
        spans: dict[str, list[tuple[str, Span, str | None]]] = {}
        nouns: dict[str, tuple[int, str]] = {}
        for line, (video, noun, start, end, subject, caption) in csv_rows(self._root, SEGMENTS, _COLUMNS):
            where = f"{self._root.name(SEGMENTS)} line {line}"
            path, noun = caption_key(video.strip().replace("\\", "/")), class_noun(noun)
            if not is_video(path) or path.startswith("../"):
                raise UserError(f"{where} has '{video}' for a video; give a file below the root, {' '.join(SUFFIXES)}")
            if not noun:
                raise UserError(f"{where} has no class noun; say what the subject is, such as mug")
            subject = subject.strip() or str(PurePosixPath(path).with_suffix("")).replace("/", "-")
            if "/" in subject:
                raise UserError(f"{where} has the subject '{subject}'; name it without a slash")
            first, other = nouns.setdefault(subject, (line, noun))
            if other != noun:
                raise UserError(
                    f"{where} calls subject {subject} a {noun}, line {first} a {other}; correct one of them"
                )
            span = Span(_seconds(start, where), _seconds(end, where))
            if span.end is not None and span.end <= (span.start or 0):
                raise UserError(f"{where} ends a segment at {end.strip()}, not after its start; correct it")
            text = " ".join(caption.split()) or captions.get(path)
            spans.setdefault(subject, []).append((path, span, text))
        self._report_unlisted({path for rows in spans.values() for path, _, _ in rows})
        for subject, rows in sorted(spans.items()):
            subject_id = f"{self._params.name}/{nouns[subject][1].replace(' ', '_')}/{subject}"
            names: dict[str, int] = {}
            photos = []
            for path, span, text in rows:
                stem = PurePosixPath(path).stem
                names[stem] = names.get(stem, 0) + 1
                last = stem if names[stem] == 1 else f"{stem}.{names[stem]}"
                photos.append(Photo(f"{subject_id}/{last}", path, caption=text, span=span))
            photos.sort(key=lambda photo: photo.frame_id)
            yield Subject(subject_id, self._params.name, nouns[subject][1], self._params.split, tuple(photos))

    def _videos(self, folder: str, below: bool = True) -> Iterator[str]:
        """Yield the paths of the videos in a folder, and in its folders."""
        inside = f"{folder}/" if folder else ""
        yield from (f"{inside}{name}" for name in self._root.files(folder) if is_video(name) and not is_hidden(name))
        if below:
            for name in self._root.folders(folder):
                if not is_hidden(name):
                    yield from self._videos(f"{inside}{name}")

    def _report_unlisted(self, listed: set[str]) -> None:
        others = [path for path in self._videos("") if caption_key(path) not in listed]
        if others:
            what = "1 video is" if len(others) == 1 else f"{len(others)} videos are"
            _log.warning("%s not in %s and so not read: %s", what, SEGMENTS, self._root.name(others[0]))


def _seconds(text: str, where: str) -> float | None:
    """Return a time in seconds, given as such or as `m:ss` or `h:mm:ss`; None if it is empty."""
    if not text.strip():
        return None
    try:
        values = [float(part) for part in text.split(":")]
    except ValueError:
        values = [math.nan]
    if len(values) > 3 or not all(0 <= value < math.inf for value in values):
        raise UserError(f"{where} has '{text.strip()}' for a time; give seconds, or minutes and seconds as 1:23.5")
    return sum(value * 60**power for power, value in enumerate(reversed(values)))


def _not_a_video(frame_id: str, path: str) -> Photo:
    """Return the reject of a file among videos that is none."""
    hint = ", photos are read by layout folder" if is_image(path) else ""
    return Photo(frame_id, path, reject="not_a_video", reject_detail=f"suffix '{PurePosixPath(path).suffix}'{hint}")
