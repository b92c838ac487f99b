"""Storage of finished shards until a stage completes: a local folder or an fsspec URL, such as `s3://bucket/work`.

`<root>/<stage>/<identity>/<shard>/` holds one Parquet file per table and `items.json`, which is written last: a shard
without it does not exist.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from pipelines import tables
from runtime.errors import UserError

RECORD = "items.json"


def is_url(folder: str) -> bool:
    """Whether `folder` is a URL rather than a local path."""
    return "://" in folder


@contextlib.contextmanager
def room_on_disk(folder: Path | str) -> Iterator[None]:
    """Turn a full disk into a one-sentence error.

    Raises:
        UserError: the disk or quota of `folder` is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space left on the disk of {folder}; free some and run the same command again, finished shards are kept"
        ) from None


class WorkFolder:
    """The finished shards of one stage and identity, written by workers and read by the driver; picklable.

    Raises:
        UserError: the URL's file system is unknown or cannot be reached.
    """

    def __init__(self, root: str, *parts: str) -> None:
        # Workers may have a different working directory.
        self.url = "/".join([root.rstrip("/") if is_url(root) else str(Path(root).resolve()), *parts])
        self.remote = is_url(root)
        if self.remote:
            try:
                self.fs.exists(self.base)
            except Exception as error:  # every remote file system has its own exceptions
                reason = " ".join(str(error).split())
                raise UserError(f"work folder '{self.url}' cannot be opened ({reason}); correct run.work") from None

    def __reduce__(self) -> Any:  # connections are not pickled
        return _unpickled, (self.url, self.remote)

    @cached_property
    def fs(self) -> Any:
        """The file system of the URL."""
        return fsspec.core.url_to_fs(self.url)[0]

    @cached_property
    def base(self) -> str:
        """The folder's path in its file system."""
        return fsspec.core.url_to_fs(self.url)[1] if self.remote else self.url

    def sizes(self, names: Collection[str] = ()) -> dict[str, dict[str, int]]:
        """Return {shard: {file: bytes}} of the finished shards, from one listing however many there are.

        Args:
            names: tables without which a shard is not finished: an interrupted removal leaves only some.
        """
        found: dict[str, dict[str, int]] = {}
        if self.remote:
            self.fs.invalidate_cache()
            for path, info in self.fs.find(self.base, detail=True).items():
                shard, _, file = path[len(self.base) :].lstrip("/").partition("/")
                found.setdefault(shard, {})[file] = int(info["size"])
        else:
            for path in Path(self.url).glob("[!.]*/*"):
                found.setdefault(path.parent.name, {})[path.name] = path.stat().st_size
        needed = {RECORD, *(f"{name}.parquet" for name in names)}
        return {shard: files for shard, files in found.items() if needed <= files.keys()}

    def sweep(self) -> None:
        """Remove half-written shards of killed runs; only while no other run is active."""
        if not self.remote:
            for stale in Path(self.url).glob(".*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)

    def clear(self) -> None:
        """Remove all shards; only while no run is active."""
        if not self.remote:
            shutil.rmtree(self.url, ignore_errors=True)
        elif self.fs.exists(self.base):
            self.fs.rm(self.base, recursive=True)

    @contextlib.contextmanager
    def writing(self, shard: str) -> Iterator[Path]:
        """Yield a local folder for the shard's files; on exit without an error, the shard appears as a whole."""
        if self.remote:
            with tempfile.TemporaryDirectory() as name, room_on_disk(name):
                folder = Path(name)
                yield folder
                for file in sorted(folder.iterdir(), key=lambda file: file.name == RECORD):
                    self.fs.put_file(str(file), f"{self.base}/{shard}/{file.name}")
            return
        temporary = Path(self.url) / f".{shard}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with room_on_disk(self.url):
                temporary.mkdir(parents=True)
                yield temporary
                _take_place(temporary, Path(self.url) / shard)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def record(self, shard: str) -> dict[str, Any]:
        """Return the content of a shard's `items.json`."""
        if self.remote:
            record: dict[str, Any] = json.loads(self.fs.cat_file(f"{self.base}/{shard}/{RECORD}"))
        else:
            record = json.loads((Path(self.url) / shard / RECORD).read_text(encoding="utf-8"))
        return record

    def table(self, shard: str, name: str) -> pa.Table:
        """Return a table of a shard."""
        if not self.remote:
            return tables.read_part(Path(self.url) / shard / f"{name}.parquet", name)
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / f"{name}.parquet"
            self.fetch(shard, name, local)
            return tables.read_part(local, name)

    def fetch(self, shard: str, name: str, target: Path) -> None:
        """Put the file of a shard's table at `target`, as a hard link if possible."""
        if self.remote:
            self.fs.get_file(f"{self.base}/{shard}/{name}.parquet", str(target))
            return
        source = Path(self.url) / shard / f"{name}.parquet"
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copyfile(source, target)


def _take_place(temporary: Path, target: Path) -> None:
    """Rename a shard's folder to its final name; if another run has finished it meanwhile, its bytes are the same."""
    if target.exists() and not all((target / file.name).exists() for file in temporary.iterdir()):
        shutil.rmtree(target)  # left over from an interrupted removal
    try:
        temporary.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _unpickled(url: str, remote: bool) -> WorkFolder:
    folder = WorkFolder.__new__(WorkFolder)
    folder.url, folder.remote = url, remote
    return folder
