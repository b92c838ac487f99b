"""The build backend of pyproject.toml: reports that this repository is cloned, not installed."""

from __future__ import annotations

from typing import Any, NoReturn

SENTENCE = (
    "customcontrast is an application to clone, not a package to install: run `make` in the checkout, which sets up"
    " .venv with the command `customcontrast`"
)


def build_wheel(*_: Any, **__: Any) -> NoReturn:
    """Refuse (PEP 517)."""
    raise SystemExit(SENTENCE)


build_sdist = build_editable = build_wheel
