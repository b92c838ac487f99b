"""Tiny base models, as a parameter."""

from __future__ import annotations

import pytest

from tests.world.models import TinyDiffusion
from tests.world.pipelines import KINDS


@pytest.fixture(params=KINDS)
def diffusion(request) -> TinyDiffusion:
    return request.getfixturevalue(request.param)
