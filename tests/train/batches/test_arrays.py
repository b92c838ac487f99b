"""The large columns of the tables as arrays on the disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines import tables
from runtime.errors import UserError
from tests.world.training import World, write_world
from train.batches import arrays
from train.batches.arrays import Arrays


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world") / "data", views=4, single=0)


def test_arrays_take_their_room_on_the_disk_before_they_are_filled(tmp_path: Path):
    arrays.new_array(tmp_path / "a.npy", np.float16, (1000, 1000))
    stat = (tmp_path / "a.npy").stat()
    assert stat.st_blocks * 512 >= stat.st_size > 2 * 10**6


def test_arrays_on_a_full_disk_are_an_error_and_leave_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(code: int) -> Callable[..., None]:
        def allocate(*words: int) -> None:
            raise OSError(code, os.strerror(code))

        return allocate

    monkeypatch.setattr(os, "posix_fallocate", fails(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        arrays.write(world.data, tmp_path / "arrays" / "hash")
    assert not list((tmp_path / "arrays").iterdir())
    monkeypatch.setattr(os, "posix_fallocate", fails(errno.EOPNOTSUPP))
    assert Arrays.open(arrays.write(world.data, tmp_path / "arrays" / "hash")).latents is not None


def test_rows_of_another_shape_are_named(tmp_path: Path):
    world = write_world(tmp_path / "data", views=2, single=0)
    rows = tables.read(world.data / "encode", "latents").to_pylist()
    rows[3]["height"] = 4
    tables.write(world.data / "encode", "latents", tables.from_rows("latents", rows))
    with pytest.raises(UserError, match=f"'{rows[3]['frame_id']}' has height 4, but the rows before it have 8"):
        arrays.write(world.data, tmp_path / "arrays" / "hash")


def test_arrays_are_written_once_and_those_of_other_tables_removed(world: World, tmp_path: Path):
    first = arrays.write(world.data, tmp_path / "arrays" / "a")
    before = (first / "hidden.npy").stat().st_mtime_ns
    assert (arrays.write(world.data, first) / "hidden.npy").stat().st_mtime_ns == before
    arrays.write(world.data, tmp_path / "arrays" / "b")
    assert [folder.name for folder in (tmp_path / "arrays").iterdir()] == ["b"]
