"""A user's own photos: `<root>/<class noun>/<subject>/*.jpg|png|webp`.

Optional beside the photos: masks as `<stem>.mask.png` (or `_mask`, `-mask`) or `masks/<stem>.png`, where the photo's
whole name may stand for the stem, and the mask may be any image; at the root: `captions.csv`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from pipelines.photos.roots import Root, SourceParams, is_hidden
from pipelines.sources.base import (
    Photo,
    Prompt,
    Subject,
    caption_key,
    class_noun,
    is_image,
    masks_beside,
    match_masks,
    named_frames,
    not_an_image,
    read_captions,
    refuse_deeper,
    refuse_loose,
    report_unmatched,
)
from runtime.errors import UserError

_EXPECTED = "<class noun>/<subject>/"
_MASKS = "masks"


class Folder:
    """Reader of the folder layout.

    Raises:
        UserError: the root is missing or empty, a photo is not in a subject folder, or a mask is of two photos.
    """

    def __init__(self, params: SourceParams) -> None:
        self._params = params
        self._root = Root(params.root)
        self._unmatched: list[str] = []

    def subjects(self) -> Iterator[Subject]:
        """Yield one subject per folder."""
        captions = read_captions(self._root)
        self._unmatched.clear()
        self._check_loose_files("")
        classes = [name for name in self._root.folders() if not is_hidden(name)]
        if not classes:
            raise UserError(f"'{self._root.url}' has no folders; put photos into {_EXPECTED} there")
        for class_folder in classes:
            if "\ufffd" in class_folder or not class_noun(class_folder):
                fault = "is not UTF-8" if "\ufffd" in class_folder else "has no letter"
                raise UserError(f"folder '{self._root.name(class_folder)}' {fault}, so it is no class noun; rename it")
            self._refuse_masks(class_folder)
            self._check_loose_files(class_folder)
            for subject in self._root.folders(class_folder):
                if not is_hidden(subject):
                    self._refuse_masks(f"{class_folder}/{subject}")
                    yield self._subject(class_folder, f"{class_folder}/{subject}", captions)
        report_unmatched(self._root, self._unmatched)

    def prompts(self) -> Iterator[Prompt]:
        """Yield nothing: this layout has no prompts."""
        return iter(())

    def _subject(self, class_folder: str, folder: str, captions: dict[str, str]) -> Subject:
        subject_id = f"{self._params.name}/{folder}"
        files = self._root.files(folder)
        refuse_deeper(self._root, folder, _EXPECTED, {_MASKS})
        stems = {name: PurePosixPath(name).stem for name in files if is_image(name) and not is_hidden(name)}
        beside = masks_beside(stems.keys())
        masks = [(stems[name], f"{folder}/{name}") for name in beside]
        for inside in (name for name in self._root.folders(folder) if name.lower() == _MASKS):
            refuse_deeper(self._root, f"{folder}/{inside}", f"{_EXPECTED}{_MASKS}/")
            for name in self._root.files(f"{folder}/{inside}"):
                path = f"{folder}/{inside}/{name}"
                if is_image(name) and not is_hidden(name):
                    masks.append((PurePosixPath(name).stem, path))
                elif not is_hidden(name):
                    self._unmatched.append(path)
        masks_of, unmatched = match_masks(stems.keys() - beside, masks, self._root.name(folder))
        self._unmatched += unmatched
        photos = []
        for last, name in named_frames(set(files) - beside).items():
            frame_id, path = f"{subject_id}/{last}", f"{folder}/{name}"
            if is_image(name):
                photos.append(
                    Photo(frame_id, path, mask_path=masks_of.get(name), caption=captions.get(caption_key(path)))
                )
            else:
                photos.append(not_an_image(frame_id, path))
        return Subject(subject_id, self._params.name, class_noun(class_folder), self._params.split, tuple(photos))

    def _refuse_masks(self, folder: str) -> None:
        if PurePosixPath(folder).name.lower() == _MASKS:
            raise UserError(f"'{self._root.name(folder)}' is read as no mask; put masks into {_EXPECTED}{_MASKS}/")

    def _check_loose_files(self, folder: str) -> None:
        refuse_loose(self._root, folder, _EXPECTED)
        self._root.report_archives(folder)
