"""Open Images V5 to V7: `<split>/<ImageID>.jpg`, CSV annotations, `<split>-masks/`.

Every box is a subject of its own with one photo, because Open Images does not say which boxes show the same object. The
subject is `<source>/<split>/<ImageID>/<BoxID>`, or ends with the number of the box in the photo if the segmentation
file lacks it; its photo is `<subject>/0`. A photo without boxes is the subject `<source>/<split>/<ImageID>`.

Only splits whose photo folder exists are read. The photos and masks of a split may be spread over several folders or
archives, as they are published: `train_0`, `train_0.tar`, `train-masks-0.zip`. The image file (`IMAGE_FILES`), if it is
there, has licences and authors. Files and columns: https://storage.googleapis.com/openimages/web/
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from pipelines.photos.roots import Root, SourceParams
from pipelines.sources.base import (
    Photo,
    Prompt,
    Subject,
    caption_key,
    class_noun,
    is_image,
    named_frames,
    not_an_image,
    read_captions,
    refuse_deeper,
)
from pipelines.sources.openimages_csv import Box, read_boxes, read_credits, read_masks, with_masks
from runtime.errors import UserError

SPLITS = ("test", "train", "validation")
BOX_FILES = ("oidv7-{split}-annotations-bbox.csv", "oidv6-{split}-annotations-bbox.csv", "{split}-annotations-bbox.csv")
MASK_FILE = "{split}-annotations-object-segmentation.csv"
IMAGE_FILES = (
    "{split}-images-boxable-with-rotation.csv",
    "{split}-images-with-rotation.csv",
    "oidv6-{split}-images-with-labels-with-rotation.csv",
    "image_ids_and_rotation.csv",
)
"""Files with each photo's licence and author; of all splits in the last."""
CLASS_FILES = (
    "oidv7-class-descriptions-boxable.csv",
    "oidv6-class-descriptions-boxable.csv",
    "class-descriptions-boxable.csv",
    "oidv7-class-descriptions.csv",
    "oidv6-class-descriptions.csv",
)


class OpenImages:
    """Reader of the Open Images layout.

    Raises:
        UserError: the root, the class list, the boxes of a split or a column is missing, or a class is unknown.
    """

    def __init__(self, params: SourceParams) -> None:
        self._params = params
        self._root = Root(params.root)

    def subjects(self) -> Iterator[Subject]:
        """Yield a subject per box, per photo without boxes, and per annotated photo that is missing."""
        folders = self._folders()
        if not folders:
            raise UserError(f"'{self._root.url}' has no folder train, validation or test; put the photos there")
        classes = read_classes(self._root)
        captions = read_captions(self._root)
        for split, photo_folders in sorted(folders.items()):
            yield from self._split(split, photo_folders, classes, captions)

    def prompts(self) -> Iterator[Prompt]:
        """Yield nothing: this layout has no prompts."""
        return iter(())

    def _folders(self) -> dict[str, list[str]]:
        """Return the photo folders of each split; the train archives are train_0 .. train_f."""
        folders: dict[str, list[str]] = {}
        for name, folder in self._places():
            if found := re.fullmatch(rf"({'|'.join(SPLITS)})(_[0-9a-f])?", name):
                folders.setdefault(found[1], []).append(folder)
        return folders

    def _places(self) -> list[tuple[str, str]]:
        """Return (name, path) of the folders and archives at the root; archives are named without their suffix."""
        return [*((name, name) for name in self._root.folders()), *sorted(self._root.archives().items())]

    def _split(
        self, split: str, folders: list[str], classes: dict[str, str], captions: dict[str, str]
    ) -> Iterator[Subject]:
        for folder in folders:
            refuse_deeper(self._root, folder, f"{split}/")
        files = {name: f"{folder}/{name}" for folder in folders for name in self._root.files(folder)}
        photos = {image_id: files[name] for image_id, name in named_frames(files).items()}
        numbers = {image_id: number for number, image_id in enumerate(photos)}
        box_file = self._box_file(split)
        boxes = read_boxes(self._root, box_file, numbers)
        masks = read_masks(self._root, MASK_FILE.format(split=split), numbers)
        mask_paths = self._mask_paths(split, numbers)
        credits = read_credits(self._root, self._image_file(split), numbers)
        for image_id in sorted(photos.keys() | boxes.missing | masks.missing):
            base = f"{self._params.name}/{split}/{image_id}"
            if image_id not in photos:
                photo = _rejected(base, f"{split}/{image_id}.jpg", "missing_file", f"named in {box_file}")
                yield self._subject(base, "", photo)
                continue
            path = photos[image_id]
            found = with_masks(boxes.of(image_id), masks.of(image_id))
            if not is_image(path):
                yield self._subject(base, "", not_an_image(f"{base}/0", path))
            elif not found:
                yield self._subject(base, "", _rejected(base, path, "no_annotation", f"no row in {box_file}"))
            else:
                instances = Counter(box.label for box in found.values())
                for last, box in found.items():
                    subject_id, mask_path = f"{base}/{last}", mask_paths.get(box.mask)
                    photo = _photo(
                        subject_id, path, box, mask_path, captions.get(caption_key(path)), instances[box.label]
                    )
                    licence, attribution = credits[numbers[image_id]]
                    photo = replace(photo, licence=licence, attribution=attribution)
                    yield self._subject(subject_id, self._class(box, classes), photo)

    def _subject(self, subject_id: str, class_name: str, photo: Photo) -> Subject:
        return Subject(subject_id, self._params.name, class_name, self._params.split, (photo,))

    def _class(self, box: Box, classes: dict[str, str]) -> str:
        if box.label in classes:
            return classes[box.label]
        raise UserError(
            f"{self._root.name(box.where)} has the class '{box.label}', which the class descriptions lack; "
            "use those of the same version"
        )

    def _box_file(self, split: str) -> str:
        names = [name.format(split=split) for name in BOX_FILES]
        for name in names:
            if self._root.exists(name):
                return name
        raise UserError(f"'{self._root.url}' has {split} photos but no boxes; put {names[-2]} or {names[-1]} there")

    def _image_file(self, split: str) -> str | None:
        names = (name.format(split=split) for name in IMAGE_FILES)
        return next((name for name in names if self._root.exists(name)), None)

    def _mask_paths(self, split: str, photos: Mapping[str, int]) -> dict[str, str]:
        """Return {MaskPath: path} of the mask files of photos; they may be in several archives (`train-masks-0`)."""
        paths: dict[str, str] = {}
        for place, folder in self._places():
            if re.fullmatch(rf"{split}-masks(-[0-9a-f])?", place):
                for name in self._root.files(folder):
                    if name.partition("_")[0] in photos:
                        paths.setdefault(name, f"{folder}/{name}")
        return paths


def read_classes(root: Root) -> dict[str, str]:
    """Return {MID: class noun} of the class descriptions, with V7's header or without one.

    Raises:
        UserError: there is no such file, or a line is not `MID,name`.
    """
    file = next((name for name in CLASS_FILES if root.exists(name)), None)
    if file is None:
        raise UserError(f"'{root.url}' has no class descriptions; put {CLASS_FILES[0]} there")
    classes: dict[str, str] = {}
    reader = csv.reader(root.lines(file), strict=True)
    try:
        for row in reader:
            if not row or [cell.strip() for cell in row] == ["LabelName", "DisplayName"]:
                continue
            if len(row) < 2 or not class_noun(row[1]) or any(cell.strip() for cell in row[2:]):
                raise UserError(f"{root.name(file)} line {reader.line_num} is not 'MID,name'; correct it")
            mid, name = row[0].strip(), class_noun(row[1])
            if classes.setdefault(mid, name) != name:
                raise UserError(f"{root.name(file)} line {reader.line_num} names {mid} again; remove one of the lines")
    except csv.Error as error:
        raise UserError(f"{root.name(file)} line {reader.line_num} is not CSV ({error}); replace the file") from None
    return classes


def _photo(subject_id: str, path: str, box: Box, mask_path: str | None, caption: str | None, instances: int) -> Photo:
    if not box.valid:
        x0, y0, x1, y1 = box.corners
        return _rejected(subject_id, path, "bad_box", f"{box.where}: x {x0:g}..{x1:g}, y {y0:g}..{y1:g}")
    return Photo(
        f"{subject_id}/0", path, mask_path, box.corners, caption, attributes=box.attributes, instances=instances
    )


def _rejected(subject_id: str, path: str, reason: str, detail: str) -> Photo:
    return Photo(f"{subject_id}/0", path, reject=reason, reject_detail=detail)
