"""Fixtures of the network's tests."""

from __future__ import annotations

import pytest

from tests.world import models as tiny_models


@pytest.fixture
def tiny_sd() -> tiny_models.TinyDiffusion:
    return tiny_models.tiny_sd()


@pytest.fixture
def tiny_sdxl() -> tiny_models.TinyDiffusion:
    return tiny_models.tiny_sdxl()
