"""What the tests of exports share: the engine without Ray, and an export of small tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.engine import actors
from pipelines.export.command import export_pairs
from pipelines.export.formats import FORMATS
from tests.world import exports


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Shards are computed in this process."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(actors, "compute", exports.compute_here)


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    """`export("webdataset", views=2)`: the folder of an export of the small tables, with some options changed."""

    def make(name: str, out: str = "out", **changes: Any) -> Path:
        if not (tmp_path / "data").exists():
            exports.write_tables(tmp_path)
        export_pairs(exports.params(tmp_path), FORMATS[name], replace(exports.SMALL, **changes), str(tmp_path / out))
        return tmp_path / out

    return make
