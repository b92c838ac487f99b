import sys
from pathlib import Path

import pytest
import torch

from runtime.params import load
from tests.world import training as tiny_world
from train.recipe import TrainParams


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON of a variant whose diffusion model is tiny."""
    return tiny_world.write_variant(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def params(variant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainParams:
    """The train section of a tiny run."""
    monkeypatch.setattr(sys, "argv", ["train.launch", *tiny_world.write_options(tmp_path, variant, tmp_path, ranks=2)])
    return load("train", TrainParams)
