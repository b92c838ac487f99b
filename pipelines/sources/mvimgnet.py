"""MVImgNet: `<class id>/<video id>/{images,masks,sparse/0}` and `mvimgnet_category.txt`.

The set is published by class and as numbered parts, which overlap, with the masks in separate archives. All may be
placed side by side, unpacked or not, as `<archive>/<class id>/<video id>/...`: folders of the same class and video are
one subject. Its frames, masks and sparse model each come from the first archive that has them (unpacked ones first,
then by name). If a video folder of an archive directly contains images and has no `images`, those are its masks.
Layout: README of GAP-LAB-CUHK-SZ/MVImgNet and, for the masks, of luyues/MVImgNet2.0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import PurePosixPath

from pipelines.photos.roots import Root, SourceParams, is_hidden
from pipelines.sources import colmap
from pipelines.sources.base import (
    Photo,
    Pose,
    Prompt,
    Subject,
    caption_key,
    class_noun,
    is_image,
    match_masks,
    named_frames,
    not_an_image,
    read_captions,
    refuse_deeper,
    refuse_loose,
    report_unmatched,
)
from runtime.errors import UserError

CATEGORIES = "mvimgnet_category.txt"
_EXPECTED = "<class id>/<video id>/images/"

_log = logging.getLogger(__name__)

Centre = tuple[float, float, float]


class MVImgNet:
    """Reader of the MVImgNet layout. A frame missing from the sparse model has no pose.

    Raises:
        UserError: the root or category list is missing or malformed, or the list lacks a class id.
    """

    def __init__(self, params: SourceParams) -> None:
        self._params = params
        self._root = Root(params.root)
        self._unmatched: list[str] = []

    def subjects(self) -> Iterator[Subject]:
        """Yield one subject per video, sorted by class id and video id as text."""
        names = read_categories(self._root)
        captions = read_captions(self._root)
        self._unmatched.clear()
        videos = self._videos()
        if not videos:
            raise UserError(f"'{self._root.url}' has no <class id>/<video id>/ folders; unpack MVImgNet there")
        for (class_id, video_id), folders in sorted(videos.items()):
            if class_id not in names:
                raise UserError(
                    f"{self._root.name(CATEGORIES)} has no class id {class_id}, but folder '{folders[0]}' exists; "
                    f"add the line '{class_id},<class name>' or remove the folder"
                )
            yield self._subject(f"{self._params.name}/{class_id}/{video_id}", names[class_id], folders, captions)
        report_unmatched(self._root, self._unmatched)

    def prompts(self) -> Iterator[Prompt]:
        """Yield nothing: this layout has no prompts."""
        return iter(())

    def _videos(self) -> dict[tuple[str, str], list[str]]:
        """Return the folders of each (class id, video id), in order of the archives."""
        top = [name for name in self._root.folders() if not is_hidden(name)]
        classes = [name for name in top if name.isdecimal()]
        unpacked = [name for name in top if not name.isdecimal()]
        for archive in [*unpacked, *sorted(self._root.archives().values())]:
            if PurePosixPath(archive).name.isdecimal():  # a class archive with a folder of its own name inside
                classes.append(archive)
            else:
                classes += [f"{archive}/{name}" for name in self._root.folders(archive) if name.isdecimal()]
        videos: dict[tuple[str, str], list[str]] = {}
        for folder in classes:
            refuse_loose(self._root, folder, _EXPECTED)
            for video in self._root.folders(folder):
                if not is_hidden(video):
                    videos.setdefault((PurePosixPath(folder).name, video), []).append(f"{folder}/{video}")
        return videos

    def _subject(self, subject_id: str, name: str, folders: list[str], captions: dict[str, str]) -> Subject:
        images = self._first_of_each(folders, "images")
        masks = self._first_of_each(folders, "masks")
        if len(folders) > 1:
            for folder in folders:
                if not self._root.isdir(f"{folder}/images"):
                    masks = {name: f"{folder}/{name}" for name in self._root.files(folder) if is_image(name)} | masks
        masks_of, unmatched = match_masks(
            [name for name in images if is_image(name) and not is_hidden(name)],
            [(PurePosixPath(name).stem, masks[name]) for name in masks if is_image(name) and not is_hidden(name)],
            self._root.name(folders[0]),
        )
        self._unmatched += unmatched
        poses, centre = self._sparse(folders)
        photos = []
        for last, file in named_frames(images).items():
            frame_id, path = f"{subject_id}/{last}", images[file]
            if not is_image(file):
                photos.append(not_an_image(frame_id, path))
                continue
            pose = poses.get(file, poses.get(PurePosixPath(file).stem))
            photos.append(
                Photo(frame_id, path, mask_path=masks_of.get(file), caption=captions.get(caption_key(path)), pose=pose)
            )
        return Subject(subject_id, self._params.name, name, self._params.split, tuple(photos), centre)

    def _first_of_each(self, folders: list[str], kind: str) -> dict[str, str]:
        """Return {file name: path} over the folders' `kind` subfolders, each file from the first that has it."""
        paths: dict[str, str] = {}
        for folder in folders:
            if self._root.isdir(f"{folder}/images"):  # without, its images are masks
                refuse_loose(self._root, folder, _EXPECTED)
            refuse_deeper(self._root, f"{folder}/{kind}", f"<class id>/<video id>/{kind}/")
            for name in self._root.files(f"{folder}/{kind}"):
                paths.setdefault(name, f"{folder}/{kind}/{name}")
        return paths

    def _sparse(self, folders: list[str]) -> tuple[dict[str, Pose], Centre | None]:
        """Return the poses by file name and by stem, and the object's centre, of the first readable sparse model."""
        for folder in folders:
            try:
                model = colmap.read_model(self._root, f"{folder}/sparse/0")
                if model is not None:
                    poses = colmap.poses(model)
                    by_name = {PurePosixPath(name).name: pose for name, pose in sorted(poses.items())}
                    by_stem = {PurePosixPath(name).stem: pose for name, pose in by_name.items()}
                    return by_stem | by_name, colmap.object_centre(poses.values(), model.read_points)
            except colmap.ColmapError as error:  # the photos are usable without poses
                _log.warning("%s: used without poses: %s", folder, error)
        return {}, None


def read_categories(root: Root) -> dict[str, str]:
    """Return {class id: class noun} of the category list: `id,name` lines, no header, CRLF, stray spaces, any order.

    Raises:
        UserError: the list is missing, or a line is malformed or repeats an id with another name; names the line.
    """
    if not root.exists(CATEGORIES):
        raise UserError(f"{root.name(CATEGORIES)} is missing; copy MVImgNet's category list there")
    file = root.name(CATEGORIES)
    names: dict[str, str] = {}
    for number, line in enumerate(root.lines(CATEGORIES), start=1):
        if not line.strip():
            continue
        class_id, _, raw = (part.strip() for part in line.partition(","))
        name = class_noun(raw)
        if not class_id.isdecimal() or not name:
            raise UserError(f"{file} line {number} is '{line.strip()}'; write '<class id>,<class name>'")
        if names.setdefault(class_id, name) != name:
            raise UserError(f"{file} line {number} names class id {class_id} again; remove one of the lines")
    return names
