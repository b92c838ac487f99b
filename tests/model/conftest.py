"""Fixtures of the network's tests."""

from __future__ import annotations

import pytest
import torch

from tests.world import models as tiny_models


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny_sd() -> tiny_models.TinyDiffusion:
    return tiny_models.tiny_sd()


@pytest.fixture
def tiny_sdxl() -> tiny_models.TinyDiffusion:
    return tiny_models.tiny_sdxl()
