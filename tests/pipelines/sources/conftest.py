"""Tiny layouts for the readers, which never open a photo: empty files will do."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.sources import SourceParams


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """`put("a/b.jpg", ...)` makes files under tmp_path, empty or with `content=`; returns tmp_path."""

    def make(*paths: str, content: str | bytes = b"") -> Path:
        for path in paths:
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return make


@pytest.fixture
def params(tmp_path: Path) -> Callable[..., SourceParams]:
    """`params("folder")` describes a source named s at tmp_path, or at `root=`."""

    def make(layout: str, root: Path = tmp_path) -> SourceParams:
        return SourceParams.model_validate({"name": "s", "layout": layout, "root": str(root), "split": "train"})

    return make
