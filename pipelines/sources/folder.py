"""A user's own photos: `<root>/<class noun>/<subject>/*.jpg|png|webp`.

Optional beside the photos: masks as `<stem>.mask.png` or `masks/<stem>.png`; at the root: `captions.csv`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from pipelines.photos.roots import Root, SourceParams, is_hidden
from pipelines.sources.base import (
    Photo,
    Prompt,
    Subject,
    class_noun,
    is_image,
    named_frames,
    not_an_image,
    read_captions,
)
from runtime.errors import UserError

_MASK_SUFFIX = ".mask.png"


class Folder:
    """Reader of the folder layout.

    Raises:
        UserError: the root is missing or empty, or a photo is not in a subject folder.
    """

    def __init__(self, params: SourceParams) -> None:
        self._params = params
        self._root = Root(params.root)

    def subjects(self) -> Iterator[Subject]:
        """Yield one subject per folder."""
        captions = read_captions(self._root)
        self._refuse_loose_photos("")
        classes = [name for name in self._root.folders() if not is_hidden(name)]
        if not classes:
            raise UserError(f"'{self._root.url}' has no folders; put photos into <class noun>/<subject>/ there")
        for class_folder in classes:
            self._refuse_loose_photos(class_folder)
            for subject in self._root.folders(class_folder):
                if not is_hidden(subject):
                    yield self._subject(class_folder, f"{class_folder}/{subject}", captions)

    def prompts(self) -> Iterator[Prompt]:
        """Yield nothing: this layout has no prompts."""
        return iter(())

    def _subject(self, class_folder: str, folder: str, captions: dict[str, str]) -> Subject:
        subject_id = f"{self._params.name}/{folder}"
        files = self._root.files(folder)
        beside = {name for name in files if name.endswith(_MASK_SUFFIX)}
        masks = {PurePosixPath(name).name.removesuffix(_MASK_SUFFIX): f"{folder}/{name}" for name in beside}
        masks |= {
            name.removesuffix(".png"): f"{folder}/masks/{name}"
            for name in self._root.files(f"{folder}/masks")
            if name.endswith(".png")
        }
        photos = []
        for last, name in named_frames(set(files) - beside).items():
            frame_id, path = f"{subject_id}/{last}", f"{folder}/{name}"
            if is_image(name):
                mask = masks.get(PurePosixPath(name).stem)
                photos.append(Photo(frame_id, path, mask_path=mask, caption=captions.get(path)))
            else:
                photos.append(not_an_image(frame_id, path))
        return Subject(subject_id, self._params.name, class_noun(class_folder), self._params.split, tuple(photos))

    def _refuse_loose_photos(self, folder: str) -> None:
        for name in self._root.files(folder):
            if is_image(name) and not is_hidden(name):
                path = self._root.name(f"{folder}/{name}" if folder else name)
                raise UserError(f"photo '{path}' is not in a subject folder; move it to <class noun>/<subject>/")
