"""CO3D, version 2: `<category>/<sequence>/{images,masks}/frame000001.*` and, for each category, two annotation files.

`frame_annotations.jgz` and `sequence_annotations.jgz` are gzipped JSON lists; the first has each frame's camera and the
path of its mask, the second each capture's `viewpoint_quality_score`. Depth maps, point clouds and `set_lists` are not
read. A photo without an annotation has no pose; an annotated photo that is missing is a reject. Layout: README and
co3d/dataset/data_types.py of facebookresearch/co3d.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np

from pipelines.photos.decode import DecodeError
from pipelines.photos.roots import Root, SourceParams
from pipelines.sources.base import (
    Photo,
    Pose,
    Prompt,
    Subject,
    caption_key,
    class_noun,
    is_image,
    named_frames,
    not_an_image,
    read_captions,
    refuse_deeper,
    refuse_loose,
)
from pipelines.sources.colmap import object_centre
from pipelines.sources.turntables import cameras
from pipelines.sources.turntables.captures import Subset
from runtime.errors import UserError

FRAMES = "frame_annotations.jgz"
SEQUENCES = "sequence_annotations.jgz"
LICENCE = "CC-BY-NC-4.0"
ATTRIBUTION = "CO3Dv2, Meta Platforms, Inc., https://github.com/facebookresearch/co3d"
NOUNS = {
    "baseballbat": "baseball bat",
    "baseballglove": "baseball glove",
    "cellphone": "cell phone",
    "hairdryer": "hair dryer",
    "hotdog": "hot dog",
    "hydrant": "fire hydrant",
    "parkingmeter": "parking meter",
    "plant": "potted plant",
    "remote": "remote control",
    "stopsign": "stop sign",
    "teddybear": "teddy bear",
    "toybus": "toy bus",
    "toyplane": "toy plane",
    "toytrain": "toy train",
    "toytruck": "toy truck",
    "wineglass": "wine glass",
}
"""Class nouns of the categories that are none themselves."""
_EXPECTED = "<category>/<sequence>/images/"
_CHUNK = 1 << 20  # bytes of JSON read at once

T = TypeVar("T")


@dataclass(frozen=True)
class Annotation:
    """What is annotated of a frame: the path of its mask, and its camera."""

    mask: str | None
    pose: Pose | None


class CO3D:
    """Reader of the CO3D layout.

    Raises:
        UserError: there is no category, or an annotation file is missing or malformed.
    """

    def __init__(self, params: SourceParams) -> None:
        self._params = params
        self._root = Root(params.root)

    def subjects(self) -> Iterator[Subject]:
        """Yield one subject per sequence whose folder is there, of the classes and quality that are asked for."""
        subset, captions = Subset(self._params), read_captions(self._root)
        categories = [name for name in self._root.folders() if self._root.exists(f"{name}/{FRAMES}")]
        if not categories:
            raise UserError(f"'{self._root.url}' has no <category>/{FRAMES}; unpack CO3Dv2 there")
        self._root.report_archives()
        for category in categories:
            yield from self._category(category, subset, captions)
        subset.report(self._root)

    def prompts(self) -> Iterator[Prompt]:
        """Yield nothing: this layout has no prompts."""
        return iter(())

    def _category(self, category: str, subset: Subset, captions: dict[str, str]) -> Iterator[Subject]:
        noun = NOUNS.get(category, class_noun(category))
        if not subset.has_class(noun, class_noun(category)):
            return
        refuse_loose(self._root, category, _EXPECTED)
        folders = {name for name in self._root.folders(category) if self._root.isdir(f"{category}/{name}/images")}
        quality = self._qualities(category)
        wanted = [name for name in sorted(quality.keys() | folders) if subset.takes(quality.get(name), name in folders)]
        frames = self._annotations(category, set(wanted)) if wanted else {}
        for sequence in wanted:
            yield self._subject(category, sequence, noun, frames.get(sequence, {}), subset, captions)

    def _subject(
        self,
        category: str,
        sequence: str,
        noun: str,
        frames: dict[str, Annotation],
        subset: Subset,
        captions: dict[str, str],
    ) -> Subject:
        subject_id, folder = f"{self._params.name}/{category}/{sequence}", f"{category}/{sequence}/images"
        refuse_deeper(self._root, folder, _EXPECTED)
        files = set(self._root.files(folder))
        masks = {PurePosixPath(name).stem: name for name in self._root.files(f"{category}/{sequence}/masks")}
        photos = []
        for last, name in subset.frames(list(named_frames(files | frames.keys()).items())):
            frame_id, path = f"{subject_id}/{last}", f"{folder}/{name}"
            if not is_image(name):
                photos.append(not_an_image(frame_id, path))
                continue
            of = frames.get(name, Annotation(None, None))
            mask = masks.get(PurePosixPath(of.mask or name).stem)
            missing = name not in files
            photos.append(
                Photo(
                    frame_id,
                    path,
                    mask_path=f"{category}/{sequence}/masks/{mask}" if mask else None,
                    caption=captions.get(caption_key(path)),
                    pose=of.pose,
                    reject="missing_file" if missing else None,
                    reject_detail=f"named in {category}/{FRAMES}" if missing else "",
                    licence=LICENCE,
                    attribution=ATTRIBUTION,
                )
            )
        centre = object_centre([of.pose for of in frames.values() if of.pose], lambda: np.empty((0, 3)))
        return Subject(subject_id, self._params.name, noun, self._params.split, tuple(photos), centre)

    def _qualities(self, category: str) -> dict[str, float | None]:
        """Return the quality score of each annotated sequence."""
        path = f"{category}/{SEQUENCES}"
        if not self._root.exists(path):
            raise UserError(f"{self._root.name(path)} is missing; it has the captures' quality scores")
        return dict(self._rows(path, lambda row: (row["sequence_name"], row.get("viewpoint_quality_score"))))

    def _annotations(self, category: str, wanted: set[str]) -> dict[str, dict[str, Annotation]]:
        """Return the frames of sequences by the name of the photo's file."""
        found: dict[str, dict[str, Annotation]] = defaultdict(dict)

        def taken(row: Any) -> tuple[str, str, Annotation] | None:
            sequence, name = row["sequence_name"], PurePosixPath(row["image"]["path"]).name
            if sequence not in wanted:
                return None
            return sequence, name, Annotation((row.get("mask") or {}).get("path"), _pose(row))

        for entry in self._rows(f"{category}/{FRAMES}", taken):
            if entry is not None:
                sequence, name, annotation = entry
                found[sequence][name] = annotation
        return found

    def _rows(self, path: str, take: Callable[[Any], T]) -> Iterator[T]:
        """Yield what `take` makes of each entry of an annotation file.

        Raises:
            UserError: it is no gzipped JSON list of such entries.
        """
        file = self._root.name(path)
        try:
            with gzip.open(io.BytesIO(self._root.read(path))) as stream:
                for row in json_list(stream):
                    yield take(row)
        except (ValueError, TypeError, AttributeError, KeyError, OSError, EOFError, zlib.error, DecodeError) as error:
            raise UserError(f"{file} is not CO3D's annotation file ({error!r}); download it again") from None


def json_list(stream: Any) -> Iterator[Any]:
    """Yield the entries of a JSON list one by one: annotations of a category are hundreds of megabytes of text.

    Raises:
        ValueError: it is no list, or cut off.
    """
    decoder, text = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    buffer, done = "", False
    opened = False
    while True:
        if not done:
            data = stream.read(_CHUNK)
            done = not data
            buffer += text.decode(data, final=done)
        at = 0
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n,":
                at += 1
            if at == len(buffer):
                break
            if not opened:
                if buffer[at] != "[":
                    raise ValueError("it is no list")
                opened, at = True, at + 1
                continue
            if buffer[at] == "]":
                return
            try:
                row, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError:
                if done:
                    raise
                break  # cut by the end of the buffer
            if end == len(buffer) and not done:
                break  # a number may go on
            yield row
            at = end
        if done:
            raise ValueError("the list is cut off")
        buffer = buffer[at:]


def _pose(row: dict[str, Any]) -> Pose | None:
    """Return the camera of a frame; None if it has none."""
    view = row.get("viewpoint")
    if not view:
        return None
    return cameras.pose(
        view.get("R"),
        view.get("T"),
        view.get("focal_length"),
        view.get("principal_point"),
        row["image"].get("size") or (),
        view.get("intrinsics_format") or cameras.BY_SIDE,
    )
