"""Large columns of the training tables as memory-mapped arrays: random access, one copy for all ranks."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables
from runtime.errors import UserError

LATENT = ("channels", "height", "width")
MASK = ("height", "width")
HIDDEN = ("layers", "tokens", "width")


@dataclass(frozen=True)
class Arrays:
    """Rows in the order of their tables."""

    latents: np.ndarray | None
    """[frames, C, h, w] fp16; None if encode.latents is off."""
    masks: np.ndarray | None
    """[frames, h, w] uint8, 255 = all subject; None with `latents`."""
    hidden: np.ndarray | None
    """[frames x augmentations, K, N, d] fp16; None if hidden states are off or over encode.max_gigabytes."""
    cosines: np.ndarray
    """[sum of the tiles' sizes] fp16: the values of all similarity tiles, concatenated."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map the arrays that `write` stored in `folder`."""
        found: dict[str, Any] = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r") if (folder / f"{name}.npy").exists() else None
            for name in cls.__annotations__
        }
        return cls(**found)


def write(data: Path, folder: Path) -> Path:
    """Write the arrays of the tables under `data` to `folder`, which appears only when complete, and return it.

    Does nothing if it exists. Arrays of other tables beside it are removed: arrays take as much disk as their tables.

    Raises:
        UserError: rows of a table differ in shape.
        OSError: the disk has no space for them.
    """
    if folder.exists():
        return folder
    shutil.rmtree(folder.parent, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True)
    encode = data / "encode"
    try:
        fill(temporary / "latents.npy", np.float16, encode, "latents", "latent", LATENT)
        fill(temporary / "masks.npy", np.uint8, encode, "latents", "subject_mask", MASK)
        fill(temporary / "hidden.npy", np.float16, encode, "features", "hidden", HIDDEN)
        fill_cosines(temporary / "cosines.npy", data / "similarity")
        sync(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # frees space on a full disk
        raise
    temporary.rename(folder)
    return folder


def fill(file: Path, dtype: Any, folder: Path, table: str, column: str, axes: Sequence[str]) -> None:
    """Write a list column as one array [rows, *axes], part by part to keep only one in memory; nothing if the table is
    empty."""
    rows = sum(len(part) for part in read_parts(folder, table, axes[:1]))
    shape: tuple[int, ...] | None = None
    array, row = None, 0
    for part in read_parts(folder, table, ["frame_id", column, *axes]):
        for chunk in part.to_batches():
            shape = shape or tuple(chunk[axis][0].as_py() for axis in axes)
            require_shape(folder, table, chunk, axes, shape)
            if array is None:
                array = new_array(file, dtype, (rows, *shape))
            values = chunk[column].flatten().to_numpy(zero_copy_only=False)
            if len(values) != len(chunk) * int(np.prod(shape)):
                raise UserError(
                    f"{folder / table}: '{column}' does not have {' x '.join(axes)} values per row; run {folder.name}"
                    " again"
                )
            array[row : row + len(chunk)] = values.reshape(-1, *shape)
            row += len(chunk)
    if array is not None:
        array.flush()


def fill_cosines(file: Path, folder: Path) -> None:
    """Write the values of all tiles, concatenated."""
    sizes = [
        pc.sum(pc.list_value_length(part["values"])).as_py() or 0
        for part in read_parts(folder, "similarity", ["values"])
    ]
    array = new_array(file, np.float16, (sum(sizes),))
    start = 0
    for part in read_parts(folder, "similarity", ["values"]):
        for chunk in part["values"].chunks:
            values = chunk.flatten().to_numpy(zero_copy_only=False)
            array[start : start + len(values)] = values
            start += len(values)
    array.flush()


def new_array(file: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """An array file to fill. Its disk space is allocated here: if writing a page found none, the kernel would kill the
    process without a message."""
    array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
    if sys.platform == "linux":
        with file.open("rb+") as stream:
            try:
                os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not every file system supports it
                    raise
    return array


def read_parts(folder: Path, table: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the nonempty parts of a table."""
    for part in tables.parts(folder, table):
        read = tables.read_part(part, table, columns)
        if len(read):
            yield read


def require_shape(folder: Path, table: str, rows: pa.RecordBatch, axes: Sequence[str], shape: Sequence[int]) -> None:
    """Raise UserError naming the first row with a different shape."""
    for axis, size in zip(axes, shape, strict=True):
        odd = np.flatnonzero(rows[axis].to_numpy() != size)
        if len(odd):
            frame_id, found = rows["frame_id"][odd[0]].as_py(), rows[axis][odd[0]].as_py()
            raise UserError(
                f"{folder / table}: '{frame_id}' has {axis} {found}, but the rows before it have {size}; run"
                f" {folder.name} again, so that one model makes all rows"
            )


def sync(folder: Path) -> None:
    """Flush `folder`, its files and directory entries, to disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
