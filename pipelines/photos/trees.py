"""Folder trees on any file system that fsspec supports."""

from __future__ import annotations

import contextlib
import errno
import stat
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipelines.photos.archives import UNKNOWN, DamagedFile, file_time
from runtime.errors import UserError


class FolderTree:
    """A folder tree on any file system that fsspec supports; paths are that file system's own.

    Bytes of local names that are not UTF-8 are shown as U+FFFD, as in archives.
    """

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self._local = isinstance(fs, LocalFileSystem)

    def read(self, path: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            OSError: there is none.
            DamagedFile: it is a link that leads nowhere, or a pipe or device.
        """
        return self._fs.cat_file(self._file(path))

    def open(self, path: str) -> Any:
        """Return a binary stream of a file, which reads it in parts; raises as `read`."""
        return self._fs.open(self._file(path), "rb")

    def entries(self, path: str) -> list[tuple[str, bool]]:
        """Return (name, whether it is a folder) of a folder's entries; none if it does not exist.

        Raises:
            UserError: two names differ only in bytes that are not UTF-8.
        """
        try:
            found: list[dict[str, Any]] = self._fs.ls(self._real(path), detail=True)
        except OSError as error:
            if is_absent(error):
                return []
            raise
        own = self._real(path)
        inside = (entry for entry in found if entry["name"].rstrip("/") != own)  # object stores list the folder itself
        entries = [(shown_name(PurePosixPath(entry["name"]).name), self._is_folder(entry)) for entry in inside]
        strange = [name for name, _ in entries if UNKNOWN in name]
        if len(strange) > len(set(strange)):
            raise UserError(
                f"'{path}' holds several names like '{strange[0]}', which are not UTF-8 and cannot be told apart; "
                "rename them"
            )
        return entries

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder at `path`."""
        return self._kind(path) is not None

    def isfile(self, path: str) -> bool:
        """Whether there is a file at `path`."""
        return self._kind(path) == "file"

    def isdir(self, path: str) -> bool:
        """Whether there is a folder at `path`."""
        return self._fs.isdir(self._real(path))

    def info(self, path: str) -> tuple[int, float]:
        """Return (size, modification time); OSError if there is no file."""
        real = self._real(path)
        return int(self._fs.info(real)["size"] or 0), file_time(self._fs, real)

    def _kind(self, path: str) -> str | None:
        """Return the type of what is at `path`, or None. fsspec's own `exists` takes every error for absence."""
        try:
            kind: str = self._fs.info(self._real(path))["type"]
        except OSError as error:
            if is_absent(error):
                return None
            raise
        return kind

    def _real(self, path: str) -> str:
        """Return the path of an entry as the file system knows it."""
        if not self._local or UNKNOWN not in path:
            return path
        real = ""
        for part in path.split("/"):
            if UNKNOWN in part:
                with contextlib.suppress(OSError):
                    part = next(
                        (file.name for file in Path(real or "/").iterdir() if shown_name(file.name) == part), part
                    )
            real = f"{real}/{part}" if real or not part else part
        return real if path.startswith("/") else real.removeprefix("/")

    def _file(self, path: str) -> str:
        """Return the path of a file as the file system knows it; one that is no file would be waited for."""
        real = self._real(path)
        if self._local:
            self._refuse_what_is_no_file(Path(real))
        return real

    def _refuse_what_is_no_file(self, path: Path) -> None:
        try:
            mode = path.stat().st_mode
        except OSError as error:  # of a link whose target is only out of reach, reading says so
            if is_absent(error) and path.is_symlink():
                raise DamagedFile("a link that leads nowhere") from None
        else:
            if stat.S_ISDIR(mode) and path.is_symlink():
                raise DamagedFile("a link to a folder, not a file")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise DamagedFile("a pipe, socket or device, not a file")

    def _is_folder(self, entry: dict[str, Any]) -> bool:
        if not entry.get("islink"):
            return entry["type"] == "directory"
        # Listings report a link as neither file nor folder. One to a folder that it is in has nothing new, without end.
        link = Path(entry["name"])
        return self._fs.isdir(entry["name"]) and not link.parent.resolve().is_relative_to(link.resolve())


def file_system(place: str) -> tuple[Any, str]:
    """Return the file system of a path or URL, and the path in it; only a URL may be a chain of them (`a::b`)."""
    if "://" in place:
        fs, base = fsspec.core.url_to_fs(place)
    else:
        fs, base = fsspec.filesystem("file"), str(Path(place).expanduser().absolute())
    return fs, base.rstrip("/")


def is_absent(error: OSError) -> bool:
    """Whether an error says that there is nothing at a path, a link to itself included."""
    return isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno == errno.ELOOP


def shown_name(name: str) -> str:
    """Return a name as text: bytes that are not UTF-8 as U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
