"""Import closure of a module within the repository: the code that a stage's rows depend on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from runtime.digest import digest_files

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("runtime", "model", "pipelines", "train", "eval", "experiments", "benchmarks")
"""The repository's packages; other imports are not followed."""


def closure(*modules: str) -> list[Path]:
    """Return the files of `modules` and of every repository module they import, directly or indirectly, sorted.

    Imports inside functions count, those under `if TYPE_CHECKING` do not. The `__init__.py` of each enclosing package
    is included.

    Args:
        modules: dotted names, such as `pipelines.mask.worker`.
    """
    found: set[Path] = set()
    todo = [file for module in modules for file in files_of(module)]
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += (other for name in imports(file) for other in files_of(name))
    return sorted(found)


def code_digest(*modules: str) -> str:
    """Return 16 hex digits that change with any line in the closure of `modules`."""
    return digest_files(*closure(*modules))


def files_of(name: str) -> Iterator[Path]:
    """Yield the files that importing `name`, a repository module or a name in one, runs; none for other libraries."""
    parts = name.split(".")
    if parts[0] not in ROOMS:
        return
    place = ROOT
    for part in parts:
        place = place / part
        if place.with_suffix(".py").is_file():
            yield place.with_suffix(".py")
            return
        if not place.is_dir():
            return
        if (place / "__init__.py").is_file():
            yield place / "__init__.py"


@cache
def imports(file: Path) -> tuple[str, ...]:
    """Return the names that a file imports at run time, anywhere in it; `from a import b` as a.b."""
    return tuple(_imports(ast.parse(file.read_text(encoding="utf-8"))))


def _imports(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for other in node.orelse:
            yield from _imports(other)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child)
