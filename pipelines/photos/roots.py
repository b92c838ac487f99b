"""Roots of photos: local folders, fsspec URLs, and archives in either."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from pipelines.photos import videos
from pipelines.photos.archives import PACKED_SUFFIXES, SUFFIXES, Archive, DamagedFile
from pipelines.photos.decode import DecodeError
from pipelines.photos.trees import FolderTree, file_system, is_absent, shown_name
from runtime.errors import UserError, one_line
from runtime.params import Section

_log = logging.getLogger(__name__)


# Files and folders that operating systems, network drives and archivers leave behind, in lower case.
_LITTER = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "__macosx", "__pycache__"),
        *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000", "lost+found"),
        *("network trash folder", "temporary items", "#recycle", "#snapshot"),
    }
)

Layout = Literal[
    "mvimgnet",
    "openimages",
    "dreambench",
    "folder",
    "ffhq",
    "celebahq",
    "portraits",
    "video",
    "co3d",
    "uco3d",
    "generated",
]
"""Raw layouts, each with a reader in `pipelines.sources`."""


TURNTABLES = ("co3d", "uco3d")
"""Layouts of turntable videos."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
"""What a source may be called."""


class SourceParams(Section):
    """One entry of `sources` in params.yaml."""

    name: str = Field(pattern=NAME)  # first part of every id
    layout: Layout  # the reader
    root: str = Field(min_length=1)  # local folder or fsspec URL, or a tar or zip archive at either
    split: Literal["train", "test"]  # what the photos are used for
    # Of all photos of which the layout's own files say nothing; an entry may leave both out.
    licence: str | None = Field(default=None, min_length=1)  # SPDX id, URL of Creative Commons, or any name
    attribution: str | None = Field(default=None, min_length=1)  # whom to name for the photos
    # What is read of a set of turntable videos; without them, all of it.
    classes: tuple[str, ...] | None = Field(default=None, min_length=1)  # class nouns or categories
    min_quality: float | None = Field(default=None)  # of a capture's cameras, the set's own score
    views: int | None = Field(default=None, ge=1)  # frames of a capture at most, evenly spaced

    _place: str = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        # Workers may have a different working directory. `root` stays as written, for messages and rejects.
        self._place = self.root if "://" in self.root else str(Path(self.root).expanduser().absolute())

    @model_validator(mode="after")
    def has_its_layout_s_keys(self) -> Self:
        """Refuse what the reader of another layout would ignore."""
        for name in ("classes", "min_quality", "views"):
            if getattr(self, name) is not None and self.layout not in TURNTABLES:
                raise ValueError(f"{name} is for the layouts {' and '.join(TURNTABLES)}, not {self.layout}")
        return self

    @property
    def place(self) -> str:
        """The root as an absolute path or URL, valid in every process."""
        return self._place


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or litter of an operating system, not the user's.

    Names that begin with a dot or an @ (`@eaDir`, `@Recycle`: network drives) are.
    """
    return name.startswith((".", "@")) or name.lower() in _LITTER


class Root:
    """The folder of a source: a local path or any URL that fsspec supports. All paths are relative to it, with `/`.

    The root may be, or be inside, a tar or zip archive (`photos.tar`, `s3://bucket/photos.zip/multiview`), and archives
    directly below a root are read like folders of their full name (`mvi_00.zip/17/...`); nothing is unpacked.

    Args:
        url: the folder, as shown in messages.
        place: its location, if written differently.

    place: the location as an absolute path or URL.

    Raises:
        UserError: the folder does not exist; or, from any method, the file is temporarily unreachable.
    """

    def __init__(self, url: str, place: str | None = None) -> None:
        if shown_name(url) != url:
            raise UserError(f"root '{shown_name(url)}' has a name that is not UTF-8; rename it")
        self.url = url
        self._archives: dict[str, Archive] = {}
        try:
            self._fs, base = file_system(url if place is None else place)
            self.place = url if "://" in url else base
            self._tree: FolderTree | Archive = FolderTree(self._fs)
            found = self._tree.isdir(base)
            inside = None if found else self._archive_in(base)
            file = None if found or inside else self._file_in(base)
        except Exception as error:  # every remote file system has its own exceptions
            raise UserError(f"root '{url}' cannot be opened ({one_line(error)}); correct it in params.yaml") from None
        self._base = base
        if inside is not None:
            self._tree, self._base = inside
            found = self._tree.isdir(self._base)
        if not found:
            what = f"folder '{url}' does not exist"
            if file is not None:
                packed = file.lower().endswith(PACKED_SUFFIXES)
                kind = "a compressed archive, which cannot be read in place" if packed else "no folder, tar or zip"
                what = f"'{url}' does not exist: {PurePosixPath(file).name} is {kind}"
            elif inside is not None and not self._base:
                what = f"archive '{url}' holds no file"
            raise UserError(
                f"{what}; put the photos there, unpacked or in a tar or zip, or correct --root or the root of that "
                "source in params.yaml"
            )

    def __repr__(self) -> str:
        return f"Root({self.url!r})"

    def read(self, path: str) -> bytes:
        """Return the bytes of a file, or of a frame of a video (`pipelines.photos.videos`).

        Raises:
            FileNotFoundError: the file does not exist.
            DecodeError: the archive that contains it is damaged there, or the video has no such frame.
            UserError: it is temporarily unreadable; treating it as missing would lose the photo.
        """
        if frame := videos.split_frame(path):
            video, time = frame
            with self.open(video) as stream:
                return videos.read_frame(stream, time)
        with self._reaching(path) as (tree, full):
            return tree.read(full)

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """Open a file for reading in any order, in parts where it is not in an archive; raises as `read`, also where
        the body reads."""
        with self._reaching(path) as (tree, full), tree.open(full) as stream:
            yield stream

    def lines(self, path: str) -> Iterator[str]:
        """Yield the lines of a UTF-8 text file unchanged, without reading it as a whole; a byte order mark is dropped.

        Raises:
            UserError: the file cannot be read, or is not UTF-8.
        """
        try:
            tree, full = self._place(path)
            with io.TextIOWrapper(tree.open(full), encoding="utf-8-sig", newline="") as stream:
                yield from stream
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name(path)} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
        except UserError:
            raise
        except Exception as error:  # every remote file system has its own exceptions
            raise UserError(f"{self.name(path)} cannot be read ({one_line(error)}); check the file") from None

    def ls(self, path: str = "") -> list[str]:
        """Return the names of the files and folders in a folder, sorted; none if it does not exist."""
        return sorted(name for name, _ in self._entries(path))

    def files(self, path: str = "") -> list[str]:
        """Return the names of the files in a folder, sorted; none if it does not exist."""
        return sorted(name for name, folder in self._entries(path) if not folder)

    def folders(self, path: str = "") -> list[str]:
        """Return the names of the folders in a folder, sorted; none if it does not exist."""
        return sorted(name for name, folder in self._entries(path) if folder)

    def archives(self) -> dict[str, str]:
        """Return {name without suffix: path} of the archives at the root that are not also unpacked there.

        Every other method treats the path as a folder; if all of an archive is in a folder of the archive's own name,
        it is the path of that folder.
        """
        found = {}
        for file in self._packed(""):
            if file.lower().endswith(SUFFIXES):
                stem = file.rpartition(".")[0]
                alone = [name for name in self.ls(file) if not is_hidden(name)] == [stem]
                found[stem] = f"{file}/{stem}" if alone else file
            else:
                _log.warning("%s is skipped: it is compressed and cannot be read in place; unpack it", self.name(file))
        return found

    def report_archives(self, path: str = "") -> None:
        """Log the archives in a folder that are not also unpacked there, for layouts that read none below the root."""
        for file in self._packed(path):
            shown = self.name(f"{path}/{file}" if path else file)
            _log.warning("%s is skipped: this layout reads an archive only as the root; unpack it", shown)

    def _packed(self, path: str) -> list[str]:
        """Return the archives in a folder without those of which there is a folder beside them."""
        beside, files = set(self.folders(path)), self.files(path)
        tars = {file for file in files if file.lower().endswith(SUFFIXES)}
        found = []
        for file in files:
            stem, first = file.rpartition(".")[0], file.partition(".")[0]
            unpacked = stem in beside if file in tars else bool({first, stem} & {*beside, *tars})
            if file.lower().endswith((*SUFFIXES, *PACKED_SUFFIXES)) and not (is_hidden(file) or unpacked):
                found.append(file)
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
        """Return (size in bytes, modification time in seconds; 0 if the file system does not report it).

        Those of a frame are its video's.

        Raises:
            FileNotFoundError: the file does not exist.
            UserError: it is temporarily unreachable.
        """
        video, _ = videos.split_frame(path) or (path, "")
        with self._reaching(video) as (tree, full):
            return tree.info(full)

    def name(self, path: str) -> str:
        """Return `path` as shown in messages, on one line: control characters and the like as escapes."""
        whole = f"{self.url.rstrip('/')}/{path}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole)

    def _entries(self, path: str) -> list[tuple[str, bool]]:
        with self._reaching(path) as (tree, full):
            return tree.entries(full)

    @contextlib.contextmanager
    def _reaching(self, path: str) -> Iterator[tuple[FolderTree | Archive, str]]:
        """Yield the tree that contains `path` and the path in it; separate permanent errors from temporary ones."""
        try:
            yield self._place(path)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            if not (is_absent(error) or isinstance(error, IsADirectoryError)):
                raise self._unreachable(path, error) from None
            raise FileNotFoundError(f"{self.name(path)} is not a file ({one_line(error)})") from None
        except DamagedFile as error:
            raise DecodeError("unreadable", str(error)) from None
        except (UserError, DecodeError):
            raise
        except Exception as error:  # every remote file system has its own exceptions
            raise self._unreachable(path, error) from None

    def _unreachable(self, path: str, error: Exception) -> UserError:
        return UserError(
            f"{self.name(path)} cannot be read ({one_line(error)}); check that it can be reached and run the "
            "same command again, finished work is kept"
        )

    def _place(self, path: str) -> tuple[FolderTree | Archive, str]:
        """Return the tree that contains `path`, and the path in it."""
        head, _, rest = path.partition("/")
        if head.lower().endswith(SUFFIXES) and isinstance(self._tree, FolderTree):
            if head not in self._archives and self._tree.isfile(f"{self._base}/{head}"):
                self._archives.setdefault(head, Archive(self._fs, f"{self._base}/{head}", self.name(head)))
            if head in self._archives:
                return self._archives[head], rest
        return self._tree, "/".join(part for part in (self._base, path) if part)

    def _file_in(self, base: str) -> str | None:
        """Return the file that the path `base` leads to or into; None if there is none."""
        parts = base.split("/")
        heads = ("/".join(parts[:end]) for end in range(len(parts), 1, -1))
        return next((head for head in heads if self._tree.isfile(head)), None)

    def _archive_in(self, base: str) -> tuple[Archive, str] | None:
        """Return the archive that the path `base` leads into, and the rest of the path; None if there is none."""
        parts = base.split("/")
        for end in range(1, len(parts) + 1):
            head = "/".join(parts[:end])
            if head.lower().endswith(SUFFIXES) and self._tree.isfile(head):
                return Archive(self._fs, head, self.url), "/".join(parts[end:])
        return None


class Roots:
    """The roots of all sources by name, opened on first use.

    Raises:
        UserError: two sources have the same name, or a name is unknown.
    """

    def __init__(self, sources: Iterable[SourceParams]) -> None:
        self._sources: dict[str, SourceParams] = {}
        self._open: dict[str, Root] = {}
        for source in sources:
            if source.name in self._sources:
                raise UserError(f"params.yaml has two sources '{source.name}'; give each its own name")
            self._sources[source.name] = source

    def __getitem__(self, source: str) -> Root:
        if source not in self._sources:
            raise UserError(f"params.yaml has no source '{source}'; add it or run the curate stage again")
        if source not in self._open:
            self._open[source] = Root(self._sources[source].root, self._sources[source].place)
        return self._open[source]
