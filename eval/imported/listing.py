"""Lists of images made elsewhere: a folder of `<subject>/<prompt>_<seed>.png`, or a CSV file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image

from eval.imported.names import ListedPrompt, Misnamed, Names, hint, matching, seed_of, split_name
from pipelines.photos.decode import FORMATS
from pipelines.photos.listings import csv_header, csv_rows
from pipelines.photos.roots import Root, is_hidden
from runtime.errors import UserError

COLUMNS = ("path", "subject", "prompt", "seed")
REFERENCE = "reference"
"""A column that may be missing or empty: the reference is then unknown."""
SHOWN = 3
"""Faults and examples that a message names."""
AS_FOLDER = (
    "name images <subject>/<prompt>_<seed>.png, the prompt as its text or its number in the list, "
    "or list them in a CSV file with the columns path, subject, prompt, seed, reference"
)


@dataclass(frozen=True)
class NamedImage:
    """An image and what it was made for.

    path: below the root. reference: frame_id of a photo of the subject; "" if unknown.
    """

    path: str
    subject_id: str
    prompt: ListedPrompt
    seed: int
    reference: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        """What no other image of the method has."""
        return self.subject_id, self.prompt.prompt_id, self.seed


@dataclass
class ImageList:
    """The images of a method, and what the user should know of them.

    Attributes:
        method: its name in the tables.
        place: as the user wrote it.
        root: what the images' paths are relative to.
        remarks: sentences about files that are not scored.
    """

    method: str
    place: str
    root: Root
    images: list[NamedImage] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def list_images(place: str, method: str, names: Names, unusable: set[str]) -> ImageList:
    """Return the images in a folder or archive of them, or in a CSV file.

    Args:
        unusable: ids of photos that cannot serve as a reference here: dropped, or without a usable mask.

    Raises:
        UserError: there are none, or some have no known subject, prompt or seed, or one that another has too.
    """
    if place.lower().endswith(".csv"):
        folder, file = _parent(place)
        listing = ImageList(method, place, _opened(folder, place))
        faults = _from_csv(listing, file, names, unusable)
    else:
        listing = ImageList(method, place, _opened(place, place))
        faults = _from_folder(listing, names)
    faults += _repeated(listing.images)
    if faults:
        remedy = AS_FOLDER if not place.lower().endswith(".csv") else "correct these lines"
        raise UserError(f"{place}: {first_of(faults)}; {remedy}")
    if not listing.images:
        raise UserError(f"{place} holds no image of a held-out subject; {AS_FOLDER}")
    return listing


def first_of(found: Sequence[str]) -> str:
    """Return the first few of several texts, and how many more there are."""
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def suffixes() -> set[str]:
    """Return the suffixes of the image files that are read, in lower case."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def _opened(folder: str, place: str) -> Root:
    """Return the root of a folder or archive; `place`: what the user named."""
    path = Path(place).expanduser()
    if "://" not in place and path.is_file() and path.suffix.lower() not in (".csv", ".tar", ".zip"):
        raise UserError(f"--images {place} is no folder, tar, zip or CSV file; {AS_FOLDER}")
    try:
        return Root(folder)
    except UserError as error:
        raise UserError(f"--images {place}: {str(error).partition(';')[0]}; correct the path") from None


def _parent(place: str) -> tuple[str, str]:
    """Return the folder of a CSV file and its name; links are followed, so that `..` leads where it does for others."""
    if "://" in place:
        folder, _, name = place.rpartition("/")
        return folder, name
    path = Path(place).expanduser()
    return str(path.parent.resolve()), path.name


def _from_folder(listing: ImageList, names: Names) -> list[str]:
    """Add the images of a folder to `listing`; return what is wrong with the others."""
    faults: list[str] = []
    ignored: list[str] = []
    known = suffixes()
    dropped: Counter[str] = Counter()
    for folder, files in _folders(listing.root):
        pictures = [name for name in files if PurePosixPath(name).suffix.lower() in known]
        ignored += [_path(folder, name) for name in files if PurePosixPath(name).suffix.lower() not in known]
        if not pictures:
            continue
        if not folder:
            faults += [f"'{name}' is in no subject's folder" for name in pictures]
            continue
        try:
            subject_id = names.subject(folder)
        except Misnamed as error:
            faults.append(f"'{_path(folder, pictures[0])}' {error}")
            continue
        if subject_id in names.dropped:
            dropped[subject_id] += len(pictures)
            continue
        for name in pictures:
            path = _path(folder, name)
            try:
                prompt, seed = split_name(PurePosixPath(name).stem)
                image = NamedImage(path, subject_id, names.prompt(subject_id, prompt), seed_of(seed))
                listing.images.append(image)
            except Misnamed as error:
                faults.append(f"'{path}' {error}")
    if ignored:
        what = "1 file is no image and was" if len(ignored) == 1 else f"{len(ignored)} files are no images and were"
        listing.remarks.append(f"{what} ignored: {first_of(ignored)}")
    _remark_dropped(listing, dropped)
    return faults


def _from_csv(listing: ImageList, file: str, names: Names, unusable: set[str]) -> list[str]:
    """Add the images of a CSV file to `listing`; return what is wrong with its other lines."""
    faults: list[str] = []
    dropped: Counter[str] = Counter()
    lost: list[str] = []
    for line, cells in rows_of(listing.root, file, listing.place):
        try:
            subject_id = names.subject(cells["subject"])
            if subject_id in names.dropped:
                dropped[subject_id] += 1
                continue
            path = _below(listing.root, cells["path"].strip())
            if not path or not listing.root.exists(path) or listing.root.isdir(path):
                raise Misnamed(f"names the image '{cells['path']}', which is not there")
            prompt = names.prompt(subject_id, cells["prompt"])
            reference = reference_of(names, subject_id, cells.get(REFERENCE, ""), unusable)
            if reference in unusable:
                lost.append(reference)
                reference = ""
            listing.images.append(NamedImage(path, subject_id, prompt, seed_of(cells["seed"]), reference))
        except Misnamed as error:
            faults.append(f"line {line} {error}")
    if lost:
        listing.remarks.append(
            f"{len(lost)} references count as unknown, their photos have no usable mask or were dropped: "
            f"{first_of(list(dict.fromkeys(lost)))}"
        )
    _remark_dropped(listing, dropped)
    return faults


def reference_of(names: Names, subject_id: str, written: str, unusable: set[str]) -> str:
    """Return the frame_id of a reference that is written as such, as its last part, or as the photo's file, alone or
    in the folder of the subject; "" for "".

    Raises:
        Misnamed: the subject has no such photo.
    """
    if not written.strip():
        return ""
    own = [photo.frame_id for photo in names.subjects[subject_id].photos]
    own += [frame_id for frame_id in sorted(unusable) if frame_id.startswith(f"{subject_id}/") and frame_id not in own]
    path = PurePosixPath(written.strip().replace("\\", "/"))
    found = matching(str(path), own)
    if path.parent.name in ("", PurePosixPath(subject_id).name):
        found = found or matching(path.name, own) or matching(path.stem, own)
    if len(found) != 1:
        last = [PurePosixPath(frame_id).name for frame_id in own]
        raise Misnamed(f"has the reference '{written}', which is no photo of {subject_id}{hint(path.stem, last)}")
    return found[0]


def rows_of(root: Root, file: str, shown: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, {column: cell}) of a CSV file with the columns COLUMNS and perhaps REFERENCE.

    Raises:
        UserError: a column is missing, or a line has another number of cells than the header.
    """
    header = csv_header(root, file)
    names = [name.lower() for name in header]
    for name in COLUMNS:
        if name not in names:
            raise UserError(f"{shown} has no column '{name}' (found: {', '.join(names) or 'nothing'}); {AS_FOLDER}")
    for line, row in csv_rows(root, file, header):
        yield line, dict(zip(names, row, strict=True))


def _repeated(images: Sequence[NamedImage]) -> list[str]:
    """Return what is wrong with images that have the subject, prompt and seed of an earlier one."""
    first: dict[tuple[str, int, int], NamedImage] = {}
    return [
        f"'{image.path}' has the subject, prompt and seed of '{first[image.key].path}'"
        for image in images
        if first.setdefault(image.key, image) is not image
    ]


def _folders(root: Root, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield each folder with the names of its files, depth first; without what operating systems leave behind."""
    yield path, [name for name in root.files(path) if not is_hidden(name)]
    for name in root.folders(path):
        if not is_hidden(name):
            yield from _folders(root, _path(path, name))


def _remark_dropped(listing: ImageList, dropped: Counter[str]) -> None:
    for subject_id, count in sorted(dropped.items()):
        listing.remarks.append(
            f"{count} images of {subject_id} are not scored: none of its photos passed curate and has a usable mask"
        )


def _below(root: Root, path: str) -> str:
    """Return a path of a CSV file relative to its folder."""
    path = path.replace("\\", "/")
    if path.startswith(("/", "~")) and "://" not in root.url:
        path = os.path.relpath(Path(path).expanduser(), root.place)
    return os.path.normpath(path) if path else ""


def _path(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
