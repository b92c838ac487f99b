from pathlib import Path

import pytest
import torch

from tests.train import tiny_world


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON of a variant whose diffusion model is tiny."""
    return tiny_world.write_variant(tmp_path_factory.mktemp("tiny"))
