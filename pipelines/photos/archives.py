"""Tar and zip archives read in place: an archive is indexed once, then each file is read by its offset.

The index of an archive is kept in the user's cache (`$XDG_CACHE_HOME/customcontrast/archives`, default `~/.cache`) and
memory-mapped from there, so that all workers on a machine share one copy and none scans the archive again. A changed
archive is indexed again; an unwritable cache only costs time.
"""

from __future__ import annotations

import bisect
import calendar
import contextlib
import hashlib
import io
import os
import posixpath
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from runtime.errors import UserError

SUFFIXES = (".tar", ".zip")
# No random access: reading the last file means unpacking all before it.
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".7z", ".rar")

_SCHEMA = pa.schema(
    [
        ("name", pa.large_string()),  # path in the archive, sorted
        ("offset", pa.int64()),  # of the file's bytes (tar) or of its local header (zip); -1 for a dangling link
        ("size", pa.int64()),  # bytes of the file
        ("stored", pa.int64()),  # bytes it takes up in the archive
        ("time", pa.int64()),  # modification time, seconds
        ("crc", pa.int64()),  # CRC-32; -1 if the archive has none (tar)
    ]
)
_INDEX = 3  # format of the index: another number indexes every archive again
_Row = tuple[str, int, int, int, int, int]
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # ZIP appnote 4.3.7: signature, lengths of name and extra field
_DEFLATED = 8
UNKNOWN = "\ufffd"
"""Stands for the bytes of a name that are not UTF-8."""


class DamagedFile(Exception):
    """A file in an archive is corrupt."""


class Archive:
    """A tar or zip file on any fsspec file system, as a tree of files. Paths in it use `/`, without a leading one.

    Raises:
        UserError: on first use, if it is not an uncompressed tar or a plain zip, or is truncated.
    """

    def __init__(self, fs: Any, path: str, name: str) -> None:
        self._fs, self._path, self.name = fs, path, name

    def __reduce__(self) -> tuple[Any, ...]:
        return Archive, (self._fs, self._path, self.name)  # the index is read from the cache again

    def read(self, path: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            FileNotFoundError: there is no such file.
            DamagedFile: its checksum is wrong or its end is missing, or it is a link that leads nowhere.
        """
        row = self._row(path)
        offset, stored, crc = (int(self._columns[name][row]) for name in ("offset", "stored", "crc"))
        if offset < 0:
            raise DamagedFile("a link that leads to no file of the archive")
        if crc < 0:
            return self._bytes(offset, stored, path)
        return self._from_zip(path, offset, stored, int(self._columns["size"][row]), crc)

    def open(self, path: str) -> io.BytesIO:
        """Return a binary stream of a file, read as a whole; raises as `read`."""
        return io.BytesIO(self.read(path))

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        """Return (name, whether it is a folder) of a folder's entries, sorted; none if it does not exist."""
        prefix = f"{folder}/" if folder else ""
        at, end = self._range(prefix)
        found = []
        while at < end:
            head, slash, _ = self._names[at].as_py()[len(prefix) :].partition("/")
            found.append((head, bool(slash)))
            at = self._first(f"{prefix}{head}0") if slash else at + 1  # "0" follows "/": past everything in that folder
        return sorted(found)

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder at `path`."""
        return self.isfile(path) or self.isdir(path)

    def isfile(self, path: str) -> bool:
        """Whether there is a file at `path`."""
        at = self._first(path)
        return at < len(self._names) and self._names[at].as_py() == path

    def isdir(self, path: str) -> bool:
        """Whether there is a folder at `path`; empty folders do not count."""
        at, end = self._range(f"{path}/" if path else "")
        return at < end

    def info(self, path: str) -> tuple[int, float]:
        """Return (size, modification time); the archive's own time if it stores none for its files.

        Raises:
            OSError: there is no such file.
        """
        row = self._row(path)
        time = float(self._columns["time"][row])
        return int(self._columns["size"][row]), time or self._own_time

    def _row(self, path: str) -> int:
        at = self._first(path)
        if at == len(self._names) or self._names[at].as_py() != path:
            raise FileNotFoundError(f"{self.name} holds no file {path}")
        return at

    def _first(self, name: str) -> int:
        """Return the row of the first file whose name is not before `name`."""
        return bisect.bisect_left(range(len(self._names)), name, key=lambda row: self._names[row].as_py())

    def _range(self, prefix: str) -> tuple[int, int]:
        return (self._first(prefix), self._first(prefix[:-1] + "0")) if prefix else (0, len(self._names))

    def _bytes(self, offset: int, count: int, path: str) -> bytes:
        data = self._fs.cat_file(self._path, start=offset, end=offset + count) if count else b""
        if len(data) != count:
            raise DamagedFile(f"{self._file} ends within {path}")
        return data

    def _from_zip(self, path: str, offset: int, stored: int, size: int, crc: int) -> bytes:
        signature, name, extra = _LOCAL_HEADER.unpack(self._bytes(offset, _LOCAL_HEADER.size, path))
        if signature != b"PK\x03\x04":
            raise DamagedFile(f"{self._file} is damaged at {path}")
        data = self._bytes(offset + _LOCAL_HEADER.size + name + extra, stored, path)
        try:
            if stored != size or zlib.crc32(data) != crc:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)  # no more than the index promises
        except zlib.error as error:
            raise DamagedFile(f"{self._file} is damaged at {path} ({error})") from None
        if zlib.crc32(data) != crc:
            raise DamagedFile(f"{self._file} is damaged at {path} (checksum)")
        return data

    @property
    def _file(self) -> str:
        """The archive's file name: what is said of a file in it goes into tables, which do not depend on its folder."""
        return posixpath.basename(self.name)

    @cached_property
    def _own_time(self) -> float:
        return file_time(self._fs, self._path)

    @cached_property
    def _names(self) -> pa.Array:
        return self._table["name"].chunk(0) if self._table.num_rows else pa.array([], pa.large_string())

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return {name: self._table[name].to_numpy() for name in _SCHEMA.names if name != "name"}

    @cached_property
    def _table(self) -> pa.Table:
        folder = _cache()
        if folder is None:
            return self._index()
        place = folder / f"{_digest(self.name)}-{_digest(f'{_INDEX} {self._fs.ukey(self._path)}')}.arrow"
        with contextlib.suppress(OSError, pa.ArrowInvalid):
            return pa.ipc.open_file(pa.memory_map(str(place))).read_all()
        table = self._index()
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = place.with_name(f".{place.name}.{os.getpid()}.{threading.get_ident()}.tmp")
            try:
                with pa.OSFile(str(temporary), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
                    writer.write_table(table, max_chunksize=max(table.num_rows, 1))
                temporary.replace(place)
            except OSError:
                temporary.unlink(missing_ok=True)  # frees space on a full disk
                raise
            for old in place.parent.glob(f"{_digest(self.name)}-*.arrow"):
                if old != place:
                    old.unlink(missing_ok=True)
        return table

    def _index(self) -> pa.Table:
        try:
            with self._fs.open(self._path, "rb") as stream:
                rows = list(_zip_rows(stream) if self._path.lower().endswith(".zip") else _tar_rows(stream))
        except (tarfile.TarError, zipfile.BadZipFile, OSError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"archive '{self.name}' cannot be read in place ({reason}); download it again, or unpack it"
            ) from None
        columns = list(zip(*rows, strict=True)) if rows else [()] * len(_SCHEMA)
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)
        order = table.append_column("row", pa.array(np.arange(len(rows))))
        table = order.sort_by([("name", "ascending"), ("row", "ascending")]).drop_columns("row").combine_chunks()
        if len(rows) > 1:  # of two files with the same name the later counts: tar replaces files this way
            differs = pc.not_equal(table["name"][:-1], table["name"][1:]).to_numpy()
            table = table.filter(pa.array(np.append(differs, True)))
        return table.combine_chunks()


def file_time(fs: Any, path: str) -> float:
    """Return when a file was last modified, in seconds; 0 if its file system does not report it."""
    found = fs.info(path)
    if isinstance(found.get("mtime"), int | float):
        return float(found["mtime"])
    try:
        return float(fs.modified(path).timestamp())
    except (NotImplementedError, KeyError, AttributeError):
        return 0.0


def _tar_rows(stream: Any) -> Iterator[_Row]:
    rows: dict[str, tuple[int, int, int]] = {}
    links: dict[str, tuple[str, int]] = {}
    strange: dict[str, str] = {}
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every member
            name = _plain(member.name)
            if UNKNOWN in name and strange.setdefault(name, member.name) != member.name:
                raise ValueError(f"several names like {name} are not UTF-8 and cannot be told apart")
            if member.sparse is not None:
                raise ValueError(f"{name} is stored as a sparse file")
            if member.isreg():
                rows[name] = (member.offset_data, member.size, int(member.mtime))
            elif member.islnk():
                links[name] = _plain(member.linkname), int(member.mtime)
            elif member.issym():
                target = posixpath.join("/", posixpath.dirname(name), member.linkname)
                links[name] = _plain(target), int(member.mtime)
        stream.seek(tar.offset)
        if stream.read(512).strip(b"\0"):  # tarfile takes an invalid header for the end
            raise ValueError(f"it is cut off or damaged at byte {tar.offset}")
    for name, (target, time) in links.items():
        seen = {name}
        while target in links and target not in seen:
            seen.add(target)
            target = links[target][0]
        rows[name] = rows.get(target, (-1, 0, time))
    for name, (offset, size, time) in rows.items():
        yield name, offset, size, size, time, -1


def _zip_rows(stream: Any) -> Iterator[_Row]:
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            if member.flag_bits & 1:
                raise ValueError(f"{member.filename} is encrypted")
            if member.compress_type not in (zipfile.ZIP_STORED, _DEFLATED):
                raise ValueError(f"{member.filename} is compressed by a method other than deflate")
            yield (
                *(_plain(_zip_name(member)), member.header_offset, member.file_size),
                *(member.compress_size, _seconds(member.date_time), member.CRC),
            )


def _zip_name(member: zipfile.ZipInfo) -> str:
    """Return the name of a zip entry; many programs write UTF-8 without its flag, which zipfile takes for cp437."""
    try:
        return member.filename if member.flag_bits & 0x800 else member.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return member.filename


def _seconds(date: tuple[int, int, int, int, int, int]) -> int:
    """Return the time of a zip entry; 0 if it has none: some programs leave month and day at 0."""
    try:
        return calendar.timegm((*date, 0, 0, 0))
    except ValueError:
        return 0


def _plain(name: str) -> str:
    """Return a path as stored in the index: no `./`, no leading `/` or `../`, as unpacking programs drop them, and text
    that Arrow can hold."""
    path = posixpath.normpath("/" + name.replace("\\", "/")).lstrip("/")
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _cache() -> Path | None:
    """Return the folder of the indexes; None for a user without a home."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(root).expanduser() / "customcontrast" / "archives"
    except RuntimeError:
        return None


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
