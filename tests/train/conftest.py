from pathlib import Path

import pytest

from tests.world.training import tiny_params, write_variant
from train.recipe import TrainParams


@pytest.fixture(scope="session")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON of a variant whose diffusion model is tiny."""
    return write_variant(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def params(variant: Path, tmp_path: Path) -> TrainParams:
    """The train section of a tiny run."""
    return tiny_params(tmp_path, variant, tmp_path, ranks=2).section("train", TrainParams)
