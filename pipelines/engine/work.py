"""Where finished shards lie until a stage is through: a local folder or an fsspec URL, such as `s3://bucket/work`.

`<root>/<stage>/<identity>/<shard>/` holds a Parquet file for each table and `items.json`, which is written last: a
shard without it does not exist.
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
    """Whether `folder` is a URL and not a local path."""
    return "://" in folder


@contextlib.contextmanager
def room_on_disk(folder: Path | str) -> Iterator[None]:
    """Turn a full disk into a sentence.

    Raises:
        UserError: the disk or quota of `folder` is used up.
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
    """The finished shards of one stage and identity. Workers write it and the driver reads it; picklable.

    Raises:
        UserError: the URL's file system is unknown or cannot be reached.
    """

    def __init__(self, root: str, *parts: str) -> None:
        # Workers may have another working folder.
        self.url = "/".join([root.rstrip("/") if is_url(root) else str(Path(root).resolve()), *parts])
        self.remote = is_url(root)
        if self.remote:
            try:
                self.fs.exists(self.base)
            except Exception as error:  # each remote file system has exceptions of its own
                said = " ".join(str(error).split())
                raise UserError(f"work folder '{self.url}' cannot be opened ({said}); correct run.work") from None

    def __reduce__(self) -> Any:  # connections stay in their process
        return _unpickled, (self.url, self.remote)

    @cached_property
    def fs(self) -> Any:
        """The file system of the URL."""
        return fsspec.core.url_to_fs(self.url)[0]

    @cached_property
    def base(self) -> str:
        """The folder as its file system names it."""
        return fsspec.core.url_to_fs(self.url)[1] if self.remote else self.url

    def sizes(self, names: Collection[str] = ()) -> dict[str, dict[str, int]]:
        """Return, for each finished shard, the bytes of each of its files. One listing, however many shards.

        Args:
            names: tables without which a shard is not finished: a removal that was interrupted leaves some.
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
        """Remove what killed runs left half-written; only while no other run is at work."""
        if not self.remote:
            for stale in Path(self.url).glob(".*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)

    @contextlib.contextmanager
    def writing(self, shard: str) -> Iterator[Path]:
        """Give a local folder for the shard's files; when it is left without an error, the shard is there, whole."""
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
        """Return what `items.json` of a shard says."""
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
        """Put the file of a shard's table at `target`, by a link where that is possible."""
        if self.remote:
            self.fs.get_file(f"{self.base}/{shard}/{name}.parquet", str(target))
            return
        source = Path(self.url) / shard / f"{name}.parquet"
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copyfile(source, target)


def _take_place(temporary: Path, target: Path) -> None:
    """Rename a shard's folder to its own name; one that another run has finished meanwhile has the same bytes."""
    if target.exists() and not all((target / file.name).exists() for file in temporary.iterdir()):
        shutil.rmtree(target)  # what a removal that was interrupted has left
    try:
        temporary.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _unpickled(url: str, remote: bool) -> WorkFolder:
    folder = WorkFolder.__new__(WorkFolder)
    folder.url, folder.remote = url, remote
    return folder
