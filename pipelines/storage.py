"""The one door to photos: local folders, fsspec URLs and archives in either, and bytes to pixels."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import fsspec
import numpy as np
from PIL import Image
from pydantic import Field, PrivateAttr

from params import Section, UserError
from pipelines.archives import PACKED_SUFFIXES, SUFFIXES, Archive, DamagedFile, file_time

# Named, because Pillow would otherwise also try formats that start other programs (EPS). JPEG includes MPO.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")

# EXIF orientation -> what undoes it (EXIF 2.3, tag 0x0112).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = tuple(turn for orientation, turn in _UPRIGHT.items() if orientation >= 5)

_log = logging.getLogger(__name__)


class SourceParams(Section):
    """One entry of `sources` in params.yaml."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")  # first part of every id
    layout: Literal["mvimgnet", "openimages", "dreambench", "folder"]  # the reader
    root: str  # local folder or fsspec URL, or a tar or zip archive at either
    split: Literal["train", "test"]  # what the photos are for

    _place: str = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        # Workers may have another working folder. `root` stays as it was written: messages and rejects name it.
        self._place = self.root if "://" in self.root else str(Path(self.root).expanduser().absolute())

    @property
    def place(self) -> str:
        """The root as every process finds it."""
        return self._place


class DecodeError(Exception):
    """Bytes that are not a usable image.

    reason: `empty` (no bytes), `unreadable` (truncated, corrupt or not an image), `huge` (too many pixels).
    detail: the measured value or the decoder's message.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Root:
    """The folder of a source: a local path or any URL that fsspec knows. All paths are relative to it, with `/`.

    The root may be, or lie in, a tar or zip archive (`photos.tar`, `s3://bucket/photos.zip/multiview`), and archives
    directly below a root are read like folders of their full name (`mvi_00.zip/17/...`); nothing is unpacked.

    Args:
        url: the folder, as messages name it.
        place: where it is, where that is written in another way.

    Raises:
        UserError: the folder does not exist; or, from any method, what is asked for cannot be reached for now.
    """

    def __init__(self, url: str, place: str | None = None) -> None:
        self.url = url
        self._archives: dict[str, Archive] = {}
        try:
            self._fs, base = fsspec.core.url_to_fs(url if place is None else place)
            base = base.rstrip("/")
            self._tree: Folder | Archive = Folder(self._fs)
            found = self._tree.isdir(base)
            inside = None if found else self._archive_in(base)
        except Exception as error:  # each remote file system has exceptions of its own
            raise UserError(f"root '{url}' cannot be opened ({_one_line(error)}); correct it in params.yaml") from None
        self._base = base
        if inside is not None:
            self._tree, self._base = inside
            found = self._tree.isdir(self._base)
        if not found:
            raise UserError(
                f"folder '{url}' does not exist; put the photos there or correct the root of that source in params.yaml"
            )

    def __repr__(self) -> str:
        return f"Root({self.url!r})"

    def read(self, path: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            FileNotFoundError: the file is gone.
            DecodeError: the archive that it lies in is damaged there.
            UserError: it cannot be read for now; to take that for a missing photo would lose it.
        """
        with self._reaching(path) as (tree, full):
            return tree.read(full)

    def lines(self, path: str) -> Iterator[str]:
        """Yield the lines of a UTF-8 text file as they stand, without reading it whole; a byte order mark is dropped.

        Raises:
            UserError: the file cannot be read, or is not UTF-8.
        """
        try:
            tree, full = self._place(path)
            raw = tree.open(full) if isinstance(tree, Folder) else io.BytesIO(tree.read(full))
            with io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
                yield from stream
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name(path)} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
        except UserError:
            raise
        except Exception as error:  # each remote file system has exceptions of its own
            raise UserError(f"{self.name(path)} cannot be read ({_one_line(error)}); check the file") from None

    def ls(self, path: str = "") -> list[str]:
        """Return the names of the files and folders in a folder, sorted; none when it does not exist."""
        return sorted(name for name, _ in self._entries(path))

    def files(self, path: str = "") -> list[str]:
        """Return the names of the files in a folder, sorted; none when it does not exist."""
        return sorted(name for name, folder in self._entries(path) if not folder)

    def folders(self, path: str = "") -> list[str]:
        """Return the names of the folders in a folder, sorted; none when it does not exist."""
        return sorted(name for name, folder in self._entries(path) if folder)

    def archives(self) -> dict[str, str]:
        """Return {name without suffix: path} of the archives at the root that are not unpacked beside themselves.

        The path is a folder to every other method; where all of an archive lies in a folder of the archive's own name,
        it is the path of that folder.
        """
        found = {}
        beside = set(self.folders())
        for file in self.files():
            stem, lower = file.rpartition(".")[0], file.lower()
            if lower.endswith(SUFFIXES) and stem not in beside:
                found[stem] = f"{file}/{stem}" if self.ls(file) == [stem] else file
            elif lower.endswith(PACKED_SUFFIXES) and not {file.partition(".")[0], stem} & {*beside, *self.files()}:
                _log.warning("%s is left out: a compressed tar cannot be read in place; unpack it", self.name(file))
        return found

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder at `path`."""
        with self._reaching(path) as (tree, full):
            return tree.exists(full)

    def isdir(self, path: str) -> bool:
        """Whether there is a folder at `path`."""
        with self._reaching(path) as (tree, full):
            return tree.isdir(full)

    def info(self, path: str) -> tuple[int, float]:
        """Return (size in bytes, time of the last change in seconds; 0 where the file system does not tell).

        Raises:
            FileNotFoundError: the file is gone.
            UserError: it cannot be reached for now.
        """
        with self._reaching(path) as (tree, full):
            return tree.info(full)

    def name(self, path: str) -> str:
        """Return how messages call `path`."""
        return f"{self.url.rstrip('/')}/{path}"

    def _entries(self, path: str) -> list[tuple[str, bool]]:
        with self._reaching(path) as (tree, full):
            return tree.entries(full)

    @contextlib.contextmanager
    def _reaching(self, path: str) -> Iterator[tuple[Folder | Archive, str]]:
        """Give the tree that holds `path`, and the path in it; of what then goes wrong, sort what is for good."""
        try:
            yield self._place(path)
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(f"{self.name(path)} is no file ({_one_line(error)})") from None
        except DamagedFile as error:
            raise DecodeError("unreadable", str(error)) from None
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # each remote file system has exceptions of its own
            raise UserError(
                f"{self.name(path)} cannot be read ({_one_line(error)}); see that it can be reached and run the same "
                "command again, what is done is kept"
            ) from None

    def _place(self, path: str) -> tuple[Folder | Archive, str]:
        """Return the tree that holds `path`, and the path in it."""
        head, _, rest = path.partition("/")
        if head.lower().endswith(SUFFIXES) and isinstance(self._tree, Folder):
            if head not in self._archives and self._tree.isfile(f"{self._base}/{head}"):
                self._archives.setdefault(head, Archive(self._fs, f"{self._base}/{head}", self.name(head)))
            if head in self._archives:
                return self._archives[head], rest
        return self._tree, "/".join(part for part in (self._base, path) if part)

    def _archive_in(self, base: str) -> tuple[Archive, str] | None:
        """Return the archive that the path `base` leads into, and the rest of the path; None where there is none."""
        parts = base.split("/")
        for end in range(1, len(parts) + 1):
            head = "/".join(parts[:end])
            if head.lower().endswith(SUFFIXES) and self._tree.isfile(head):
                return Archive(self._fs, head, self.url), "/".join(parts[end:])
        return None


class Folder:
    """A folder tree of any file system that fsspec knows; paths are that file system's own."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def read(self, path: str) -> bytes:
        """Return the bytes of a file; OSError where there is none."""
        return self._fs.cat_file(path)

    def open(self, path: str) -> Any:
        """Return a binary stream of a file."""
        return self._fs.open(path, "rb")

    def entries(self, path: str) -> list[tuple[str, bool]]:
        """Return (name, whether it is a folder) of what is in a folder; none when it does not exist."""
        try:
            found: list[dict[str, Any]] = self._fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        inside = (entry for entry in found if entry["name"].rstrip("/") != path)  # object stores list the folder itself
        return [(PurePosixPath(entry["name"]).name, self._is_folder(entry)) for entry in inside]

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder at `path`."""
        return self._kind(path) is not None

    def isfile(self, path: str) -> bool:
        """Whether there is a file at `path`."""
        return self._kind(path) == "file"

    def isdir(self, path: str) -> bool:
        """Whether there is a folder at `path`."""
        return self._fs.isdir(path)

    def info(self, path: str) -> tuple[int, float]:
        """Return (size, time of the last change); OSError where there is no file."""
        return int(self._fs.info(path)["size"] or 0), file_time(self._fs, path)

    def _kind(self, path: str) -> str | None:
        """Return what is at `path`, None where nothing is. fsspec's own `exists` takes every error for nothing."""
        try:
            kind: str = self._fs.info(path)["type"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        return kind

    def _is_folder(self, entry: dict[str, Any]) -> bool:
        if entry.get("islink"):  # a listing calls a link neither file nor folder
            return self._fs.isdir(entry["name"])
        return entry["type"] == "directory"


class Roots:
    """The roots of all sources by name, opened when first asked for.

    Raises:
        UserError: two sources have one name, or a name is unknown.
    """

    def __init__(self, sources: Iterable[SourceParams]) -> None:
        self._sources: dict[str, SourceParams] = {}
        self._open: dict[str, Root] = {}
        for source in sources:
            if source.name in self._sources:
                raise UserError(f"params.yaml names two sources '{source.name}'; give each its own name")
            self._sources[source.name] = source

    def __getitem__(self, source: str) -> Root:
        if source not in self._sources:
            raise UserError(f"params.yaml has no source '{source}'; add it or run the curate stage again")
        if source not in self._open:
            self._open[source] = Root(self._sources[source].root, self._sources[source].place)
        return self._open[source]


def decode_image(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """Return the photo as RGB, upright by its EXIF orientation, transparency on white, 16 bits scaled to 8.

    `max_pixels` is compared with the size in the header, before any pixel is decoded; None leaves Pillow's own limit.

    Raises:
        DecodeError: empty, unreadable or huge.
    """
    return _guarded(data, max_pixels, lambda image: _rgb(_upright(image)))


def decode_grey(data: bytes, max_pixels: int | None = None, least: int = 0) -> tuple[Image.Image, tuple[int, int]]:
    """Return the photo in grey (mode L), else as `decode_image` does, and the width and height of the whole photo.

    A JPEG comes at a half, a quarter or an eighth of its size where its shorter side keeps `least` px: its decoder then
    leaves out most of the work, and all of the colours'. 0 keeps the size.

    Raises:
        DecodeError: empty, unreadable or huge.
    """

    def convert(image: Image.Image) -> tuple[Image.Image, tuple[int, int]]:
        width, height = image.size
        if least:
            image.draft("L", (least, least))
        upright = _upright(image)
        return _grey(upright), (height, width) if _turn(image) in _SIDEWAYS else (width, height)

    return _guarded(data, max_pixels, convert)


def decode_mask_image(data: bytes, max_pixels: int | None = None) -> np.ndarray:
    """Return a mask image as bool [H, W], True on the subject.

    An image with transparent pixels is a mask by its alpha, any other by its brightest channel; the cut is at half of
    the range.
    Files that hold the values 0 and 1 only are taken as they are.

    Raises:
        DecodeError: empty, unreadable or huge.
    """
    return _guarded(data, max_pixels, lambda image: _foreground(_upright(image)))


def _guarded(data: bytes, max_pixels: int | None, convert: Any) -> Any:
    if not data:
        raise DecodeError("empty", "0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # size is judged here, and harmless oddities of old files are not news
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if max_pixels is not None and width * height > max_pixels:
                    raise DecodeError("huge", f"{width} x {height} px, the limit is {max_pixels} pixels")
                return convert(image)
        except DecodeError:
            raise
        except Image.DecompressionBombError as error:
            raise DecodeError("huge", _one_line(error)) from None
        except Image.UnidentifiedImageError:
            raise DecodeError("unreadable", "not an image of a known format") from None
        except Exception as error:  # Pillow's parsers raise whatever they stumble on
            raise DecodeError("unreadable", _one_line(error)) from None


def _upright(image: Image.Image) -> Image.Image:
    """Return the pixels of an opened file as they are to be seen."""
    image.load()
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata does not make the pixels unusable
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if _is_deep(image):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    return image if image.mode == "L" and not image.has_transparency_data else _rgb(image).convert("L")


def _foreground(image: Image.Image) -> np.ndarray:
    if _is_deep(image):
        values = _eight_bits(image)
    elif (alpha := _alpha(image)) is not None:
        values = alpha
    elif image.mode == "L":
        values = np.asarray(image)
    else:
        values = np.asarray(image.convert("RGB")).max(axis=-1)
    return values > (0 if values.max(initial=0) <= 1 else 127)


def _alpha(image: Image.Image) -> np.ndarray | None:
    """Return the alpha [H, W] uint8 of an image; None where it hides nothing, as in a mask that an editor saved."""
    if not image.has_transparency_data:
        return None
    alpha = np.asarray(image.convert("RGBA"))[..., 3]
    return alpha if (alpha < 128).any() else None


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Return a 16-bit grey image as uint8 [H, W]; values that fit in 8 bits are a grey image in a wide file."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    return (values >> 8 if values.max(initial=0) > 255 else values).astype(np.uint8)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
