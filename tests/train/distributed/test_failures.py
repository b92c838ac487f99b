"""What goes wrong outside ends in one sentence: exit code not 0, nothing half in the outs, no rank left hanging."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.backbones.diffusion import load_diffusion
from model.backbones.features.source import feature_source
from model.backbones.variant import load_variant
from runtime.errors import UserError
from tests.world import ranks as processes
from tests.world.ranks import run_ranks
from tests.world.training import World, tiny_params, write_options, write_world
from train.distributed import ranks
from train.recipe import ModelParams
from train.trainer import make_adapter, require_shapes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world") / "data", views=10, single=2)


def said_once(output: Path) -> str:
    """The one sentence in `output`."""
    said = output.read_text()
    assert said.count("error:") == 1 and "Traceback" not in said, said
    return said


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_killed_rank_ends_the_others_within_a_minute(world: World, variant: Path, tmp_path: Path):
    words = write_options(tmp_path, variant, world.data)
    begun = time.monotonic()
    codes = run_ranks(2, words, tmp_path / "output", processes.die_at_the_third_step)
    assert time.monotonic() - begun < 60
    assert codes == [1, -9]
    assert "another rank died" in said_once(tmp_path / "output")
    assert not (world.data / "train").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    "before", [processes.fill_the_disk_with_the_first_checkpoint, processes.fill_the_disk_with_the_adapter]
)
def test_full_disk_is_one_sentence(before: Callable[[int], None], world: World, variant: Path, tmp_path: Path):
    words = write_options(tmp_path, variant, world.data, steps=2, checkpoint_every=2)
    assert run_ranks(2, words, tmp_path / "output", before) == [1, 1]
    assert "out of disk space" in said_once(tmp_path / "output")
    assert not (world.data / "train").exists()
    assert not list((tmp_path / "work" / "train").glob("*/.step*"))


def test_port_in_use_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind((ranks.LOOPBACK, 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        with pytest.raises(UserError, match=r"rendezvous port \d+ is in use; give another --master_port"):
            ranks.meet(0, 1)


def test_rank_that_no_launcher_numbers_is_told_how_to_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="RANK is ''; start the ranks with python -m train, deepspeed or torchrun"):
        ranks.Ranks.join("cpu")


@pytest.mark.parametrize(
    "latent,hidden,said",
    [
        ((8, 8, 8), (2, 5, 24), "8 latent channels, but variant 'tiny' has 4"),
        ((4, 16, 8), (2, 5, 24), "16 latent rows, but variant 'tiny' has 8"),
        ((4, 8, 16), (2, 5, 24), "16 latent columns, but variant 'tiny' has 8"),
        ((4, 8, 8), (3, 5, 24), "3 image-encoder layers, but variant 'tiny' has 2"),
        ((4, 8, 8), (2, 17, 24), "17 image-encoder tokens, but variant 'tiny' has 5"),
        ((4, 8, 8), (2, 5, 32), "32 values per token, but variant 'tiny' has 24"),
    ],
)
def test_tables_of_another_backbone_are_one_sentence(
    latent: tuple[int, ...], hidden: tuple[int, ...], said: str, variant: Path
):
    tiny = load_variant(str(variant))
    data: Any = SimpleNamespace(latent_shape=(4, 8, 8), hidden_shape=(2, 5, 24))
    require_shapes(tiny, feature_source(tiny, "mfi"), data)
    data = SimpleNamespace(latent_shape=latent, hidden_shape=hidden)
    with pytest.raises(UserError, match=f"the encoded tables have {said}; run encode again"):
        require_shapes(tiny, feature_source(tiny, "mfi"), data)


def test_adapter_is_not_made_for_tables_of_another_backbone(variant: Path, tmp_path: Path):
    model = tiny_params(tmp_path, variant, tmp_path).section("model", ModelParams)
    tiny, data = load_variant(str(variant)), SimpleNamespace(latent_shape=(8, 8, 8), hidden_shape=(2, 5, 24))
    diffusion = load_diffusion(tiny.diffusion, torch.float32, "cpu")
    with pytest.raises(UserError, match="8 latent channels"):
        make_adapter(model, tiny, diffusion, data, seed=0)  # type: ignore[arg-type]
