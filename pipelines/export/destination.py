"""Where an export goes: a local folder or an fsspec URL. A file appears there as a whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec

from pipelines.engine.work import is_url, room_on_disk
from runtime.errors import UserError, one_line

UNFINISHED = ".export-unfinished"
"""Folder of a local export for files that are being written; hidden, so that no reader takes them for data."""


class Destination:
    """The folder of an export, written by workers and by the driver; picklable.

    Raises:
        UserError: it cannot be opened; or, from the methods that write, written.
    """

    def __init__(self, out: str) -> None:
        self.remote = is_url(out)
        self.url = out.rstrip("/") if self.remote else str(Path(out).expanduser().absolute())
        try:
            self.fs.exists(self.base)
        except Exception as error:  # every remote file system has its own exceptions
            raise UserError(f"--out {out} cannot be opened ({one_line(error)}); correct it") from None
        if not self.remote and Path(self.url).exists() and not Path(self.url).is_dir():
            raise UserError(f"--out {out} is a file; name a folder")

    def __reduce__(self) -> Any:  # connections are not pickled
        return Destination, (self.url,)

    @cached_property
    def fs(self) -> Any:
        """The file system."""
        return fsspec.core.url_to_fs(self.url)[0]

    @cached_property
    def base(self) -> str:
        """The folder's path in its file system."""
        return fsspec.core.url_to_fs(self.url)[1] if self.remote else self.url

    def is_empty(self) -> bool:
        """Whether there is nothing."""
        if self.remote:
            self.fs.invalidate_cache()
            return not (self.fs.exists(self.base) and self.fs.ls(self.base, detail=False))
        return not Path(self.url).exists() or not any(Path(self.url).iterdir())

    def has(self, name: str) -> bool:
        """Whether there is a file."""
        if self.remote:
            self.fs.invalidate_cache()  # listings from before it was written
        return self.fs.exists(f"{self.base}/{name}")

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file; None if there is none."""
        try:
            data: bytes = self.fs.cat_file(f"{self.base}/{name}")
        except FileNotFoundError:
            return None
        return data

    @contextlib.contextmanager
    def writing(self, label: str) -> Iterator[Path]:
        """Yield a local folder; on exit without an error its files, of any depth, appear here under the same names.

        Args:
            label: of the folder, unlike that of all others that are being written.
        """
        if self.remote:
            with tempfile.TemporaryDirectory() as name, room_on_disk(name):
                yield Path(name)
                for file in _files(Path(name)):
                    self._put(file, file.relative_to(name).as_posix())
            return
        folder = Path(self.url) / UNFINISHED / f"{label}.{os.getpid()}"
        with room_on_disk(self.url):
            try:
                folder.mkdir(parents=True)
                yield folder
                for file in _files(folder):
                    with file.open("rb") as stream:
                        os.fsync(stream.fileno())
                    target = Path(self.url) / file.relative_to(folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    file.replace(target)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _put(self, file: Path, name: str) -> None:
        """Copy a file to the store; an object is whole or absent."""
        try:
            self.fs.put_file(str(file), f"{self.base}/{name}")
        except Exception as error:  # every remote file system has its own exceptions
            raise UserError(
                f"{self.url}/{name} cannot be written ({one_line(error)}); correct that, and run the same command again"
            ) from None

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write a file from its pieces."""
        with self.writing(name.replace("/", "-")) as folder:
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as stream:
                stream.writelines(chunks)

    def sweep(self) -> None:
        """Remove what killed runs left unfinished; only while no other run is active."""
        if not self.remote:
            shutil.rmtree(Path(self.url) / UNFINISHED, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
