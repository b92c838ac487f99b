"""The code that a module runs is found by its imports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import closure as closing
from runtime.closure import closure, code_digest


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository of a few modules."""
    files = {
        "runtime/__init__.py": "",
        "runtime/errors.py": "",
        "model/__init__.py": "from runtime import errors\n",
        "model/a.py": "import model.b\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from model import typed\n",
        "model/b.py": "def f():\n    from model.parts import c\n    return c.x\n",
        "model/typed.py": "",
        "model/apart.py": "",
        "model/parts/__init__.py": "",
        "model/parts/c.py": "from model.parts.names import (\n    one,\n    two,\n)\nimport json\nx = 1\n",
        "model/parts/names.py": "one = two = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(closing, "ROOT", tmp_path)
    closing.imports.cache_clear()
    yield tmp_path
    closing.imports.cache_clear()


def names(tree: Path, module: str) -> set[str]:
    return {str(file.relative_to(tree)) for file in closure(module)}


def test_closure_follows_imports_everywhere_in_a_file_and_through_packages(tree: Path):
    assert names(tree, "model.a") == {
        "model/__init__.py",
        "model/a.py",
        "model/b.py",
        "model/parts/__init__.py",
        "model/parts/c.py",
        "model/parts/names.py",
        "runtime/__init__.py",
        "runtime/errors.py",
    }


def test_closure_of_several_modules_is_that_of_each(tree: Path):
    assert set(closure("model.a", "model.apart")) == set(closure("model.a")) | set(closure("model.apart"))
    assert closure("model.a") == sorted(closure("model.a"))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("model/a.py", True),
        ("model/parts/names.py", True),
        ("model/__init__.py", True),
        ("runtime/errors.py", True),
        ("model/typed.py", False),
        ("model/apart.py", False),
    ],
)
def test_digest_changes_with_any_line_of_the_closure_and_with_no_other(tree: Path, file: str, changes: bool):
    before = code_digest("model.a")
    (tree / file).write_text((tree / file).read_text() + "# another line\n")
    closing.imports.cache_clear()
    assert (code_digest("model.a") != before) == changes
