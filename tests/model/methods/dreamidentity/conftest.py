"""A face recogniser on disk, and both kinds of base models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.world.faces import (
    write_recogniser,
)
from tests.world.models import TinyDiffusion
from tests.world.pipelines import KINDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recogniser(tmp_path_factory.mktemp("vit"))


@pytest.fixture(params=KINDS)
def diffusion(request) -> TinyDiffusion:
    return request.getfixturevalue(request.param)
