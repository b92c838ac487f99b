"""What goes wrong outside ends in one sentence: exit code not 0, nothing half in the outs, no rank left hanging."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.backbones.variant import load_variant
from pipelines import tables
from runtime.errors import UserError
from tests.world import ranks as processes
from tests.world.ranks import run_ranks
from tests.world.training import World, write_options, write_world
from train.trainer import require_shapes


@pytest.fixture
def world(tmp_path: Path) -> World:
    return write_world(tmp_path / "data", views=10, single=2)


def said_once(output: Path) -> str:
    """The one sentence in `output`."""
    said = output.read_text()
    assert said.count("error:") == 1 and "Traceback" not in said, said
    return said


def test_killed_rank_ends_the_others_within_a_minute(world: World, variant: Path, tmp_path: Path):
    words = write_options(tmp_path, variant, world.data)
    begun = time.monotonic()
    codes = run_ranks(2, words, tmp_path / "output", processes.die_at_the_third_step)
    assert time.monotonic() - begun < 60
    assert codes == [1, -9]
    assert "another rank is gone" in said_once(tmp_path / "output")
    assert not (world.data / "train").exists()


@pytest.mark.parametrize(
    "before", [processes.fill_the_disk_with_the_first_checkpoint, processes.fill_the_disk_with_the_adapter]
)
def test_full_disk_is_one_sentence(before: Callable[[int], None], world: World, variant: Path, tmp_path: Path):
    words = write_options(tmp_path, variant, world.data, steps=2, checkpoint_every=2)
    assert run_ranks(2, words, tmp_path / "output", before) == [1, 1]
    assert "the disk took no more" in said_once(tmp_path / "output")
    assert not (world.data / "train").exists()
    assert not list((tmp_path / "work" / "train").glob("*/.step*"))


def test_port_in_use_is_one_sentence(world: World, variant: Path, tmp_path: Path):
    words = write_options(tmp_path, variant, world.data, ranks=1)
    assert run_ranks(1, words, tmp_path / "output", processes.take_the_port) == [1]
    assert "at which the ranks meet, is in use; give another --master_port" in said_once(tmp_path / "output")


def test_no_triplets_is_one_sentence(world: World, variant: Path, tmp_path: Path):
    tables.write(world.data / "curate", "triplets", tables.from_rows("triplets", []))
    assert run_ranks(1, write_options(tmp_path, variant, world.data, ranks=1), tmp_path / "output") == [1]
    assert "none of the 0 triplets" in said_once(tmp_path / "output")


def test_latent_of_another_backbone_is_one_sentence(world: World, variant: Path, tmp_path: Path):
    rows = tables.read(world.data / "encode", "latents").to_pylist()
    for row in rows:
        row["channels"], row["latent"] = 8, row["latent"] * 2
    tables.write(world.data / "encode", "latents", tables.from_rows("latents", rows))
    assert run_ranks(1, write_options(tmp_path, variant, world.data, ranks=1), tmp_path / "output") == [1]
    assert "the encoded tables have 8 latent channels and variant 'tiny' 4; run encode again" in said_once(
        tmp_path / "output"
    )


@pytest.mark.parametrize(
    "latent,hidden,said",
    [
        ((4, 16, 8), (2, 5, 24), "16 latent rows and variant 'tiny' 8"),
        ((4, 8, 16), (2, 5, 24), "16 latent columns and variant 'tiny' 8"),
        ((4, 8, 8), (3, 5, 24), "3 image-encoder layers and variant 'tiny' 2"),
        ((4, 8, 8), (2, 17, 24), "17 image-encoder tokens and variant 'tiny' 5"),
        ((4, 8, 8), (2, 5, 32), "32 values in a token and variant 'tiny' 24"),
    ],
)
def test_tables_of_another_backbone_are_one_sentence(
    latent: tuple[int, ...], hidden: tuple[int, ...], said: str, variant: Path
):
    data: Any = SimpleNamespace(latent_shape=(4, 8, 8), hidden_shape=(2, 5, 24))
    require_shapes(load_variant(str(variant)), data)
    data = SimpleNamespace(latent_shape=latent, hidden_shape=hidden)
    with pytest.raises(UserError, match=f"the encoded tables have {said}; run encode again"):
        require_shapes(load_variant(str(variant)), data)


def test_missing_similarity_tile_is_one_sentence(world: World, variant: Path, tmp_path: Path):
    rows = tables.read(world.data / "similarity", "similarity").to_pylist()
    gone = next(row["tile_id"] for row in rows if row["tile_id"].endswith("/000/001"))
    kept = [row for row in rows if row["tile_id"] != gone]
    tables.write(world.data / "similarity", "similarity", tables.from_rows("similarity", kept))
    assert run_ranks(1, write_options(tmp_path, variant, world.data, ranks=1), tmp_path / "output") == [1]
    assert f"tile '{gone}' is missing; run similarity again" in said_once(tmp_path / "output")
