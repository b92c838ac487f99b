"""Sources: subjects, their photos and their prompts. Metadata only; no reader opens a photo."""

from __future__ import annotations

import logging
import posixpath
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Literal, Protocol

from pipelines.photos.decode import READS_AVIF, READS_HEIF
from pipelines.photos.listings import csv_rows
from pipelines.photos.roots import Root, is_hidden
from pipelines.photos.videos import Span, is_video
from runtime.errors import UserError

Role = Literal["reference", "target"]

# Open Images' attributes of a box (https://storage.googleapis.com/openimages/web/download_v7.html), as reject reasons.
ATTRIBUTES = ("occluded", "truncated", "group_of", "depiction", "inside")
_HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
        *((".avif",) if READS_AVIF else ()),
        *(_HEIF_SUFFIXES if READS_HEIF else ()),
    }
)
# Photos and drawings that are not read: raw files of cameras, and formats of programs.
_FOREIGN_SUFFIXES = frozenset(
    {
        *(".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".pef", ".srw"),
        *(".avif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".ppm", ".exr", ".hdr", ".apng"),
    }
)
CAPTIONS = "captions.csv"
# Where other programs keep captions: files at the root, by stem, and files beside the photos, by suffix.
_LIKE_CAPTIONS = frozenset({"captions", "caption", "metadata"})
_TEXT_SUFFIXES = frozenset({".txt", ".caption", ".json"})
# As other programs name the mask of x.jpg.
_MASK_ENDING = re.compile(r"[._-]mask$", re.IGNORECASE)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pose:
    """Pinhole camera of a photo, in COLMAP's and OpenCV's axes (x right, y down, z forward): x_camera = R x_world + t.

    rotation: R, row-major. focal: (fx, fy), centre: principal point (cx, cy), px of the image the camera was fitted to.
    """

    rotation: tuple[float, float, float, float, float, float, float, float, float]
    translation: tuple[float, float, float]
    focal: tuple[float, float]
    centre: tuple[float, float]


@dataclass(frozen=True)
class Photo:
    """A photo of a subject; `reject` is set if its metadata alone rules it out.

    path, mask_path: relative to the source's root. box: (x0, y0, x1, y1), fractions 0..1 of the photo's sides.
    attributes: annotated attributes of the box, from `ATTRIBUTES`. instances: boxes of the same class in the photo,
    including this one; 0 without annotations.
    span: of a video, which `path` then is: the photo is the frame that is chosen for it.
    role: what a sample may use the photo as, if not as anything: `reference` (also as positive) or `target`; of all
    photos of a subject or of none.
    reject: a key of `tables.REJECT_REASONS`, with the evidence in reject_detail.
    licence: as `licences.normalised` names it. attribution: whom to name for the photo, and where it is from.
    """

    frame_id: str
    path: str
    mask_path: str | None = None
    box: tuple[float, float, float, float] | None = None
    caption: str | None = None
    pose: Pose | None = None
    attributes: tuple[str, ...] = ()
    instances: int = 0
    span: Span | None = None
    role: Role | None = None
    reject: str | None = None
    reject_detail: str = ""
    licence: str | None = None
    attribution: str | None = None


@dataclass(frozen=True)
class Subject:
    """A physical object and its photos, sorted by frame_id.

    subject_id: the frame_ids without their last part. class_name: lower-case class noun; empty if the class is unknown,
    and then every photo is rejected. centre: of the object, in the world units of the poses.
    """

    subject_id: str
    source: str
    class_name: str
    split: str
    photos: tuple[Photo, ...]
    centre: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Prompt:
    """An evaluation prompt of a subject: a row of the prompts table.

    prompt_id: position in the source's list. template: the prompt with `{class}` in place of the class noun.
    """

    subject_id: str
    class_name: str
    prompt_id: int
    template: str
    group: str


class Source(Protocol):
    """A reader of one raw layout. Both iterators are sorted by id, part by part, and yield the same items each time."""

    def subjects(self) -> Iterator[Subject]:
        """Yield every subject. Each file in a photo folder is a photo of a subject; none is skipped."""

    def prompts(self) -> Iterator[Prompt]:
        """Yield the evaluation prompts; none for training sources."""


@dataclass(frozen=True)
class LicensedSource:
    """A source with licence and attribution of its entry in params.yaml for photos of which its reader knows none."""

    source: Source
    licence: str | None
    attribution: str | None

    def subjects(self) -> Iterator[Subject]:
        for subject in self.source.subjects():
            yield replace(subject, photos=tuple(self._licensed(photo) for photo in subject.photos))

    def prompts(self) -> Iterator[Prompt]:
        return self.source.prompts()

    def _licensed(self, photo: Photo) -> Photo:
        return replace(photo, licence=photo.licence or self.licence, attribution=photo.attribution or self.attribution)


def class_noun(raw: str) -> str:
    """Return a class name as captions use it: lower case, single spaces, no underscores, composed letters (NFC)."""
    return unicodedata.normalize("NFC", " ".join(raw.replace("_", " ").split()).lower())


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def named_frames(files: Iterable[str]) -> dict[str, str]:
    """Return {last part of the frame_id: file name}, sorted: the stem, or the whole name if the stem is taken."""
    frames: dict[str, str] = {}
    for name in sorted(name for name in files if not is_hidden(name)):
        stem = PurePosixPath(name).stem
        frames[name if stem in frames else stem] = name
    return dict(sorted(frames.items()))


def match_masks(
    photos: Iterable[str], masks: Iterable[tuple[str, str]], folder: str
) -> tuple[dict[str, str], list[str]]:
    """Return {photo: path of its mask}, and the paths of the masks that match no photo, sorted.

    A mask is named after the photo's file name (`1.jpg.png`) or, if there is none, after its stem (`1.png`); either may
    end in `.mask`, `_mask` or `-mask`. Accents match whether composed or not.

    Args:
        photos: file names.
        masks: (name without the mask's own suffix, path).
        folder: as shown in messages.

    Raises:
        UserError: two photos match one mask, or two masks one photo.
    """
    photos = sorted(photos)
    known = photo_keys(photos)
    by_name: dict[str, str] = {}
    for name, path in sorted(masks):
        key = _key(name) if _key(name) in known else _key(_MASK_ENDING.sub("", name))
        if (other := by_name.setdefault(key, path)) != path:
            raise UserError(f"'{folder}' has two masks of one name, {other} and {path}; remove one of them")
    own: dict[str, str] = {}
    by_stem: dict[str, list[str]] = {}
    for photo in photos:
        if _key(photo) in by_name:
            own[photo] = by_name[_key(photo)]
        elif (stem := PurePosixPath(_key(photo)).stem) in by_name:
            by_stem.setdefault(stem, []).append(photo)
    for stem, several in by_stem.items():
        if len(several) > 1:
            raise UserError(
                f"'{folder}' has one mask, {by_name[stem]}, for the photos {' and '.join(several)}; "
                f"name a mask after its whole photo, such as {several[0]}.png"
            )
        own[several[0]] = by_name[stem]
    return own, sorted(set(by_name.values()) - set(own.values()))


def photo_keys(photos: Iterable[str]) -> set[str]:
    """Return what a mask of one of these files may be named after: whole names and stems, in comparable form."""
    keys = {_key(photo) for photo in photos}
    return keys | {PurePosixPath(key).stem for key in keys}


def masks_beside(images: Collection[str]) -> set[str]:
    """Return the masks among the images of a folder: `x.mask.png`, and beside an x also `x_mask.png`, `x-mask.png`."""
    known = photo_keys(images)
    found = set()
    for name in images:
        stem = PurePosixPath(name).stem
        ending = _MASK_ENDING.search(stem)
        if ending and (ending[0].startswith(".") or _key(stem[: ending.start()]) in known):
            found.add(name)
    return found


def report_unmatched(root: Root, masks: Sequence[str]) -> None:
    """Log how many masks match no photo, and the first of them."""
    if masks:
        what = "1 mask matches" if len(masks) == 1 else f"{len(masks)} masks match"
        _log.warning("%s no photo: %s; name a mask after its photo, as an image", what, root.name(masks[0]))


def report_other_captions(root: Root) -> None:
    """Log the files at the root that look like captions and are not read."""
    for name in root.files():
        if name != CAPTIONS and PurePosixPath(name).stem.lower() in _LIKE_CAPTIONS and not is_image(name):
            _log.warning("%s is not read; captions belong in %s, columns path and caption", root.name(name), CAPTIONS)


def refuse_loose(root: Root, folder: str, expected: str) -> None:
    """Raise a UserError if there are photos in `folder` itself; they belong below it, in `expected`."""
    for name in root.files(folder):
        if is_image(name) and not is_hidden(name):
            path = root.name(f"{folder}/{name}" if folder else name)
            raise UserError(f"photo '{path}' is not in a subject folder; move it to {expected}")


def refuse_deeper(root: Root, folder: str, expected: str, beside: Collection[str] = ()) -> None:
    """Raise a UserError if there are photos in folders of `folder`, which no reader would look at.

    Args:
        expected: where photos belong.
        beside: names of folders that are something else, lower case.
    """
    for name in root.folders(folder):
        if not is_hidden(name) and name.lower() not in beside:
            path = f"{folder}/{name}"
            for file in root.files(path):
                if is_image(file) and not is_hidden(file):
                    photo = root.name(f"{path}/{file}")
                    hint = "or use layout mvimgnet" if name == "images" else "or give a root further down"
                    raise UserError(f"photo '{photo}' lies deeper than {expected}; move it there, {hint}")
            root.report_archives(path)
            refuse_deeper(root, path, expected)


def _key(name: str) -> str:
    """Return a file name in comparable form: letters composed (NFC), and an image's suffix in lower case."""
    name = unicodedata.normalize("NFC", name)
    return str(PurePosixPath(name).with_suffix(PurePosixPath(name).suffix.lower())) if is_image(name) else name


def not_an_image(frame_id: str, path: str) -> Photo:
    """Return the reject of a file among photos that is not an image."""
    suffix = PurePosixPath(path).suffix
    hint = ""
    if suffix.lower() in _HEIF_SUFFIXES:
        hint = ", read once the package pillow-heif is installed"
    elif suffix.lower() in _FOREIGN_SUFFIXES:
        hint = ", save it as JPEG or PNG"
    elif is_video(path):
        hint = ", layout video reads videos"
    elif suffix.lower() in _TEXT_SUFFIXES:
        hint = f", captions belong in {CAPTIONS} at the root"
    return Photo(frame_id, path, reject="not_an_image", reject_detail=f"suffix '{suffix}'{hint}")


def read_captions(root: Root) -> dict[str, str]:
    """Return {photo path: caption} of the optional `captions.csv` (columns path, caption) at the root; keys are
    `caption_key`s.

    Raises:
        UserError: the file is not CSV, a row has too few or too many columns, an open quote takes in other rows, or a
            photo has two captions; names the line.
    """
    return {path: caption for path, (_, caption) in caption_rows(root).items()}


def caption_rows(root: Root) -> dict[str, tuple[int, str]]:
    """Return {photo path: (line number, caption)} of `captions.csv`, as `read_captions` does."""
    rows: dict[str, tuple[int, str]] = {}
    if not root.exists(CAPTIONS):
        return rows
    file = root.name(CAPTIONS)
    for line, (raw, text) in csv_rows(root, CAPTIONS, ("path", "caption")):
        if not text.strip():
            continue
        if "\n" in raw.strip() or any(is_image(part.partition(",")[0].strip()) for part in text.splitlines()[1:]):
            raise UserError(f"{file}: a quote that is left open takes in the rows before line {line}; close it")
        path, caption = caption_key(raw.strip().replace("\\", "/")), " ".join(text.split())
        first, other = rows.setdefault(path, (line, caption))
        if other != caption:
            raise UserError(f"{file} line {line} has another caption for {path} than line {first}; remove one of them")
    return rows


def caption_key(path: str) -> str:
    """Return a photo's path as captions are looked up: letters composed (NFC), nothing superfluous (`./`, `//`)."""
    return unicodedata.normalize("NFC", posixpath.normpath(path)).lstrip("/")
