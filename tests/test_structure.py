"""The walls of the house: who may import whom, which stage reads which params, what dvc.yaml promises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipelines", "model", "train", "eval")
# What each package may import of the others, beside measure, params and stage.
ALLOWED = {
    "pipelines": ("model",),
    "model": (),
    "train": ("model", "pipelines.tables", "pipelines.storage"),
    "eval": ("model", "pipelines.prefetch", "pipelines.tables", "pipelines.storage"),
}
ONLY_IN = {"ray": "pipelines", "deepspeed": "train"}
STAGES: dict[str, dict] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS: dict[str, object] = yaml.safe_load((ROOT / "params.yaml").read_text())
# How work is done, never what comes out of it: read by stages, listed by none.
UNLISTED = {"run"}
# Started by another module of the stage, in other processes.
ALSO_RUNS = {"train.launch": ["train/run.py"]}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Every module a file imports, wherever in it; `from a import b` as a.b."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_the_architecture_allows(package: str):
    allowed = (package, *ALLOWED[package])
    for file in modules(package):
        draws_its_world = file.is_relative_to(ROOT / "train" / "toybox")
        here = (*allowed, "pipelines.toybox") if draws_its_world else allowed
        for name in imports(file):
            if name.split(".")[0] in PACKAGES:
                assert any(name == a or name.startswith(f"{a}.") for a in here), f"{file.relative_to(ROOT)}: {name}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_ray_and_deepspeed_stay_in_their_package(library: str):
    for package in PACKAGES:
        for file in modules(package):
            if any(name.split(".")[0] == library for name in imports(file)):
                assert package == ONLY_IN[library], file.relative_to(ROOT)


def test_the_shared_edges_import_no_package_but_models_errors():
    for file in (ROOT / "measure.py", ROOT / "params.py", ROOT / "stage.py"):
        ours = {name for name in imports(file) if name.split(".")[0] in PACKAGES}
        assert ours <= {"model.errors.ModelError"}, file.name


def test_nobody_asks_whether_this_is_the_toybox():
    for package in PACKAGES:
        for file in modules(package):
            if "toybox" not in file.relative_to(ROOT).parts:
                strings = (n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant))
                assert "toybox" not in strings, file.relative_to(ROOT)


def sections_read(stage: str) -> set[str]:
    """The sections that the modules of a stage's command load."""
    module = STAGES[stage]["cmd"].split()[2]
    files = [module.replace(".", "/") + ".py", *ALSO_RUNS.get(module, [])]
    return {name for file in files for name in re.findall(r'\bload\("(\w+)"', (ROOT / file).read_text())}


@pytest.mark.parametrize("stage", STAGES)
def test_stage_lists_exactly_the_sections_it_reads(stage: str):
    assert set(STAGES[stage]["params"]) == sections_read(stage) - UNLISTED


def test_every_section_is_read_by_a_stage():
    assert set(PARAMS) == {name for stage in STAGES for name in sections_read(stage)}


@pytest.mark.parametrize("section", sorted(set(PARAMS) - {"sources"}))
def test_every_key_of_a_section_is_used_where_the_section_is_read(section: str):
    packages = {STAGES[s]["cmd"].split()[2].split(".")[0] for s in STAGES if section in sections_read(s)}
    used: set[str] = set()
    for file in (ROOT / "params.py", *(file for package in (*packages, "model") for file in modules(package))):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.add(node.value)
            elif isinstance(node, ast.AnnAssign) and package_of(file) == "model" and isinstance(node.target, ast.Name):
                used.add(node.target.id)  # settings of the network, handed on as a whole
            elif isinstance(node, ast.arg) and package_of(file) == "model":
                used.add(node.arg)
    for key in keys(PARAMS[section]):
        assert key in used, f"{section}: nothing reads '{key}'"


def package_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0]


def keys(value: object) -> Iterator[str]:
    """Every key of nested mappings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_every_module_of_ours_that_it_imports(stage: str):
    module = STAGES[stage]["cmd"].split()[2]
    start = [ROOT / (module.replace(".", "/") + ".py"), *(ROOT / f for f in ALSO_RUNS.get(module, []))]
    listed = [ROOT / dep for dep in STAGES[stage]["deps"]]
    for file in closure(start):
        if file.name != "__init__.py":
            assert any(file == dep or file.is_relative_to(dep) for dep in listed), f"{stage}: {file.relative_to(ROOT)}"


def closure(files: list[Path]) -> set[Path]:
    """The files and every module of ours they import, directly or not."""
    seen: set[Path] = set()
    todo = list(files)
    while todo:
        file = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in imports(file):
            parts = name.split(".")
            for end in range(len(parts), 0, -1):
                base = ROOT.joinpath(*parts[:end])
                if base.with_suffix(".py").is_file():
                    todo.append(base.with_suffix(".py"))
                    break
                if (base / "__init__.py").is_file():
                    todo.append(base / "__init__.py")
                    break
    return seen


def test_stages_write_no_out_twice_and_read_only_what_is_written():
    outs = [
        next(iter(o)) if isinstance(o, dict) else o
        for s in STAGES.values()
        for k in ("outs", "metrics")
        for o in s.get(k, [])
    ]
    assert len(outs) == len(set(outs))
    for name, stage in STAGES.items():
        for dep in stage["deps"]:
            path = dep if isinstance(dep, str) else next(iter(dep))
            if path.startswith("data/"):
                assert any(o == path or o.startswith(f"{path}/") for o in outs), f"{name}: {path}"
            else:
                assert (ROOT / path).exists(), f"{name}: {path}"
        assert stage["desc"]


def test_no_module_is_a_grab_bag():
    for package in PACKAGES:
        for file in modules(package):
            assert file.stem not in {"utils", "helpers", "misc", "manager", "common"}, file
