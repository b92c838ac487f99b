"""uCO3D: `metadata.sqlite` and `<super category>/<category>/<sequence>/{rgb_video.mp4,mask_video.mkv}`.

The database has, for each annotated frame, its time in the video and its camera, and for each capture its class,
captions and `_reconstruction_quality_viewpoint`. A photo is the frame of the video that is shown nearest to that time,
its mask that of the mask video. Point clouds, splats, depth maps and `set_lists` are not read. Layout: README and
uco3d/dataset_utils/orm_types.py of facebookresearch/uco3d.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import numpy as np

from pipelines.photos.roots import Root, SourceParams
from pipelines.photos.videos import frame_near
from pipelines.sources.base import Photo, Pose, Prompt, Subject, caption_key, class_noun, read_captions
from pipelines.sources.colmap import object_centre
from pipelines.sources.turntables import cameras
from pipelines.sources.turntables.captures import Subset
from runtime.errors import UserError

METADATA = "metadata.sqlite"
LICENCE = "CC-BY-4.0"
ATTRIBUTION = "uCO3D, Meta Platforms, Inc., https://github.com/facebookresearch/uco3d"
_SEQUENCES = """
SELECT sequence_name, category, _video_path, _mask_video_path, _reconstruction_quality_viewpoint,
    coalesce(nullif(_short_caption_text, ''), nullif(_caption_text, ''))
FROM sequence_annots WHERE _video_path IS NOT NULL
"""
_FRAMES = """
SELECT frame_number, frame_timestamp, _image_size, _viewpoint_R, _viewpoint_T, _viewpoint_focal_length,
    _viewpoint_principal_point, _viewpoint_intrinsics_format
FROM frame_annots WHERE sequence_name = ? ORDER BY frame_number
"""


class UCO3D:
    """Reader of the uCO3D layout.

    Raises:
        UserError: the database is missing, in an archive or not on this machine, or lacks a table or column.
    """

    def __init__(self, params: SourceParams) -> None:
        self._params = params
        self._root = Root(params.root)

    def subjects(self) -> Iterator[Subject]:
        """Yield one subject per capture whose video is there, of the classes and quality that are asked for."""
        subset, captions = Subset(self._params), read_captions(self._root)
        with self._database() as database:
            rows = []
            for row in database.execute(_SEQUENCES):
                _, category, video, _, quality, _ = row
                if subset.has_class(noun_of(category or "")) and subset.takes(quality, self._root.exists(video)):
                    rows.append((PurePosixPath(video).parent.parts, row))
            for place, row in sorted(rows, key=lambda found: found[0]):
                yield self._subject("/".join(place), row, list(database.execute(_FRAMES, row[:1])), subset, captions)
        subset.report(self._root)

    def prompts(self) -> Iterator[Prompt]:
        """Yield nothing: this layout has no prompts."""
        return iter(())

    def _subject(
        self, place: str, row: tuple[Any, ...], frames: list[tuple[Any, ...]], subset: Subset, captions: dict[str, str]
    ) -> Subject:
        _, category, video, masks, _, caption = row
        subject_id, noun = f"{self._params.name}/{place}", noun_of(category or "")
        masks = masks if masks and self._root.exists(masks) else None
        poses = {frame[0]: _pose(frame) for frame in frames}
        photos = []
        for number, time, *_ in subset.frames(frames):
            path = frame_near(video, time or 0.0)
            lacks = "no category" if not noun else "no time" if time is None else ""
            photos.append(
                Photo(
                    f"{subject_id}/{number:06d}",
                    path,
                    mask_path=frame_near(masks, time or 0.0) if masks else None,
                    caption=captions.get(caption_key(path), caption),
                    pose=poses[number],
                    reject="no_annotation" if lacks else None,
                    reject_detail=lacks,
                    licence=LICENCE,
                    attribution=ATTRIBUTION,
                )
            )
        centre = object_centre([pose for pose in poses.values() if pose], lambda: np.empty((0, 3)))
        return Subject(subject_id, self._params.name, noun, self._params.split, tuple(photos), centre)

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """Yield the database, open for reading; what SQLite says of a fault in it names the file."""
        name = self._root.name(METADATA)
        if not self._root.exists(METADATA):
            raise UserError(f"{name} is missing; it has the captures, cameras and captions")
        file = Path(self._root.place) / METADATA
        if not file.is_file():
            raise UserError(
                f"{name} is not in a folder of this machine, where SQLite could read it; copy the set there"
            )
        try:
            with contextlib.closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro&immutable=1", uri=True)) as found:
                yield found
        except (sqlite3.Error, struct.error, TypeError, ValueError) as error:
            raise UserError(f"{name} is not uCO3D's database ({error}); download it again") from None


def noun_of(category: str) -> str:
    """Return the class noun of a category of LVIS: without what it adds in parentheses."""
    return class_noun(re.sub(r"\(.*?\)", " ", category.replace("_", " ")))


def _pose(frame: tuple[Any, ...]) -> Pose | None:
    """Return the camera of a frame; None if it has none."""
    _, _, size, rotation, *more, intrinsics = frame
    if None in (size, rotation, *more):
        return None
    matrix = np.reshape(_numbers("f", rotation), (-1, 3))
    translation, focal, point = (_numbers("f", blob) for blob in more)
    return cameras.pose(matrix, translation, focal, point, _numbers("i", size), intrinsics or cameras.ISOTROPIC)


def _numbers(kind: str, blob: bytes) -> tuple[Any, ...]:
    """Return a packed tuple of numbers of 4 bytes: `f` or `i`."""
    return struct.unpack(f"<{len(blob) // 4}{kind}", blob)
