"""Run commands that are not stages, as the command line does."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from runtime.cli import Parser


def run(module: ModuleType, words: Sequence[str]) -> Any:
    """Return the result of a command's `main` for these command-line words."""
    parser = Parser()
    module.arguments(parser)
    return module.main(parser.parse_args(words))
