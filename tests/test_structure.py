"""The walls of the house: who may import whom, what a stage declares, what dvc.yaml lists, how large a room may be."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from model.backbones.variant import load_variant
from runtime.closure import ROOMS, ROOT, closure, files_of, imports
from runtime.stages import PACKAGES, Stage, stages

# What each room may import of the others. runtime is below all; nothing imports experiments or benchmarks.
ALLOWED = {
    "runtime": (),
    "model": ("runtime",),
    "pipelines": ("runtime", "model"),
    "train": ("runtime", "model", "pipelines.tables", "pipelines.photos"),
    "eval": ("runtime", "model", "pipelines.tables", "pipelines.photos"),
    # The toybox's own: it knows what was rendered, and starts the stages by their commands.
    "experiments": (
        "runtime",
        "model",
        "pipelines.tables",
        "pipelines.toybox",
        "train.recipe",
        "train.toybox",
        "eval.trial",
        "eval.score.metrics",
    ),
    "benchmarks": ("runtime", "model", "pipelines", "train", "eval"),
}
# Inside a room, what stands below the rest.
INSIDE = {
    "pipelines/tables": ("runtime", "model.images", "pipelines.tables"),
    "pipelines/photos": ("runtime", "model.images", "pipelines.tables", "pipelines.photos"),
    "pipelines/sources": ("runtime", "pipelines.photos", "pipelines.sources"),
    "pipelines/engine": ("runtime", "pipelines.tables", "pipelines.engine"),
    "pipelines/toybox": ("runtime", "pipelines.toybox"),
    "pipelines/toybox/rendering": ("pipelines.toybox.rendering",),
    "model/images": ("runtime", "model.backbones.frozen", "model.images"),
    "model/backbones": ("runtime", "model.backbones"),
}
# The only room in which a library is imported.
ONLY_IN = {"ray": "pipelines", "deepspeed": "train", "dvc": "nowhere"}
MOST_MODULES = 13
STAGES = stages()
DVC: dict[str, dict] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS: dict[str, object] = yaml.safe_load((ROOT / "params.yaml").read_text())
UNLISTED = {"run"}  # how work is done, never what comes out of it: read by stages, declared by none


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def ours(file: Path) -> Iterator[str]:
    """The modules of ours, or names in them, that a file imports."""
    return (name for name in imports(file) if name.split(".")[0] in ROOMS)


def is_below(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_the_architecture_allows(room: str):
    for file in modules(room):
        renders = file.is_relative_to(ROOT / "train" / "toybox") or file == ROOT / "eval" / "generate" / "truth.py"
        allowed = (room, *ALLOWED[room], *(("pipelines.toybox",) if renders else ()))
        for name in ours(file):
            assert is_below(name, allowed), f"{file.relative_to(ROOT)}: {name}"


@pytest.mark.parametrize("place", INSIDE)
def test_lower_parts_of_a_room_import_nothing_above_them(place: str):
    for file in modules(place):
        for name in ours(file):
            assert is_below(name, INSIDE[place]), f"{file.relative_to(ROOT)}: {name}"


def test_nothing_imports_experiments_or_benchmarks():
    for room in ROOMS:
        for file in modules(room):
            others = tuple({"experiments", "benchmarks"} - {room})
            assert not any(is_below(name, others) for name in ours(file)), file


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_cluster_s_libraries_stay_in_their_room(library: str):
    for room in set(ROOMS) - {"benchmarks"}:
        for file in modules(room):
            if any(name.split(".")[0] == library for name in imports(file)):
                assert room == ONLY_IN[library], file.relative_to(ROOT)


def graph() -> dict[Path, set[Path]]:
    """Each module with the modules that it names in its imports; a package stands for its `__init__.py`."""
    found = {}
    for room in ROOMS:
        for file in modules(room):
            named = (list(files_of(name)) for name in ours(file))
            found[file] = {files[-1] for files in named if files} - {file}
    return found


def circles(edges: dict[Path, set[Path]]) -> list[list[Path]]:
    """A walk for each circle of imports (depth first)."""
    state: dict[Path, int] = {}
    walk: list[Path] = []
    found = []

    def visit(node: Path) -> None:
        state[node] = 1
        walk.append(node)
        for other in sorted(edges.get(node, ())):
            if state.get(other) == 1:
                found.append([*walk[walk.index(other) :], other])
            elif other not in state:
                visit(other)
        walk.pop()
        state[node] = 2

    for node in sorted(edges):
        if node not in state:
            visit(node)
    return found


def test_no_module_imports_itself_through_others():
    told = [" -> ".join(str(file.relative_to(ROOT)) for file in circle) for circle in circles(graph())]
    assert not told, told


def test_circles_would_be_found():
    a, b, c = Path("a"), Path("b"), Path("c")
    assert circles({a: {b}, b: {c}, c: {a}}) == [[a, b, c, a]]
    assert circles({a: {b, c}, b: {c}, c: set()}) == []


def test_arrows_between_rooms_run_one_way():
    order = ("runtime", "model", "pipelines", "train", "eval", "benchmarks", "experiments")
    assert sorted(order) == sorted(ROOMS)
    for lower, higher in ((a, b) for n, a in enumerate(order) for b in order[n + 1 :]):
        assert not is_below(f"{higher}.x", ALLOWED[lower]), (lower, higher)


def test_no_folder_holds_more_modules_than_one_can_oversee():
    for room in ROOMS:
        counts: dict[Path, int] = defaultdict(int)
        for file in modules(room):
            counts[file.parent] += file.name not in ("__init__.py", "__main__.py")
        for folder, count in counts.items():
            assert count <= MOST_MODULES, f"{folder.relative_to(ROOT)} has {count} modules"


def test_no_two_classes_have_one_name():
    places: dict[str, list[str]] = defaultdict(list)
    for room in ROOMS:
        for file in modules(room):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(str(file.relative_to(ROOT)))
    twice = {name: files for name, files in places.items() if len(files) > 1}
    assert not twice, twice


def test_no_module_is_a_grab_bag():
    for room in ROOMS:
        for file in modules(room):
            assert file.stem not in {"utils", "helpers", "misc", "manager", "common"}, file


def test_nobody_asks_whether_this_is_the_toybox():
    for room in set(ROOMS) - {"experiments"}:
        for file in modules(room):
            names = file.relative_to(ROOT).parts
            if "toybox" not in names and file != ROOT / "runtime" / "stages.py":
                strings = {n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)}
                declared = {"toybox"} if file == ROOT / "pipelines" / "curate" / "__init__.py" else set()
                assert "toybox" not in strings - declared, file.relative_to(ROOT)


def test_nothing_reads_the_command_line_from_within():
    entrance = {ROOT / "runtime" / "cli.py"}
    borrowed = {ROOT / "train" / "launch.py"}  # DeepSpeed's launcher reads nothing else
    for room in ROOMS:
        for file in set(modules(room)) - entrance - borrowed:
            tree = ast.parse(file.read_text())
            inside = [node for node in tree.body if not is_main_guard(node)]
            for node in (found for part in inside for found in ast.walk(part)):
                assert ast.unparse(node) != "sys.argv", f"{file.relative_to(ROOT)}:{node.lineno}"
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("parse_args"):
                    assert node.args, f"{file.relative_to(ROOT)}:{node.lineno} parses the process's own words"


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)


# Stages


def test_every_package_with_a_stage_is_listed():
    declared = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for room in ROOMS
        for file in modules(room)
        if file.name == "__init__.py" and "STAGE = Stage(" in file.read_text()
    }
    assert declared == set(PACKAGES)


def test_dvc_runs_the_stages_that_are_declared_in_their_order():
    assert list(DVC) == list(STAGES)
    for name, stage in DVC.items():
        assert stage["cmd"] == f"customcontrast {name}"
        assert stage["desc"]


@pytest.mark.parametrize("name", STAGES)
def test_dvc_lists_what_a_stage_declares(name: str):
    stage, listed = STAGES[name], DVC[name]
    variant = load_variant(str(PARAMS["backbones"]["variant"]))  # type: ignore[index]
    weights = {getattr(variant, role).path for role in stage.weights}
    tables = {f"data/{place}" for place in stage.reads}
    assert set(listed["deps"]) == {*stage.folders(), *tables, *weights}
    assert listed["params"] == list(stage.sections)
    assert listed["outs"] == stage.outputs()
    assert listed.get("metrics", []) == ([f"data/{name}/summary.json"] if stage.metrics else [])
    assert listed.get("plots", []) == [f"data/{name}/{plot}" for plot in stage.plots]


@pytest.mark.parametrize("name", STAGES)
def test_code_of_a_stage_is_listed_by_folders_that_hold_all_of_it(name: str):
    folders = [ROOT / folder for folder in STAGES[name].folders()]
    for file in closure(STAGES[name].module, *STAGES[name].also):
        if file.name != "__init__.py":
            assert any(file.is_relative_to(folder) for folder in folders), file
    for one, other in pairwise(sorted(folders)):
        assert not other.is_relative_to(one)


def test_entry_of_a_stage_fits_ten_lines():
    for entry in re.split(r"\n(?=  \w+:\n)", (ROOT / "dvc.yaml").read_text().split("\nplots:\n")[0])[1:]:
        assert len(entry.strip().splitlines()) <= 10, entry


def test_stages_read_only_what_another_has_written():
    written: set[str] = set()
    for name, stage in DVC.items():
        for path in stage["deps"]:
            if path.startswith("data/"):
                assert any(out == path or out.startswith(f"{path}/") for out in written), f"{name}: {path}"
            else:
                assert (ROOT / path).exists(), f"{name}: {path}"
        own = [*stage["outs"], *stage.get("metrics", []), *stage.get("plots", [])]
        assert not written & set(own)
        written |= set(own)


def sections_read(stage: Stage) -> set[str]:
    """The sections that the modules of a stage's command read."""
    files = [file for module in (stage.module, *stage.also) for file in list(files_of(module))[-1:]]
    text = "".join(file.read_text() for file in files)
    asked = set(re.findall(r'\bsection\("(\w+)"', text))
    return asked | ({"backbones"} if re.search(r"\bparams\.variant\b", text) else set())


@pytest.mark.parametrize("name", STAGES)
def test_stage_declares_exactly_the_sections_it_reads(name: str):
    assert {key.split(".")[0] for key in STAGES[name].sections} == sections_read(STAGES[name]) - UNLISTED


def test_every_section_is_read_by_a_stage():
    assert set(PARAMS) - UNLISTED == {name.split(".")[0] for stage in STAGES.values() for name in stage.sections}


@pytest.mark.parametrize("section", sorted(set(PARAMS) - {"sources"}))
def test_every_key_of_a_section_is_used_where_the_section_is_read(section: str):
    rooms = {stage.module.split(".")[0] for stage in STAGES.values() if section in (*stage.sections, *UNLISTED)}
    used: set[str] = set()
    for file in (file for room in (*rooms, "model", "runtime") for file in modules(room)):
        is_model = file.is_relative_to(ROOT / "model")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.add(node.value)
            elif is_model and isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                used.add(node.target.id)  # settings of the network, handed on as a whole
            elif is_model and isinstance(node, ast.arg):
                used.add(node.arg)
    for key in keys(PARAMS[section]):
        assert key in used, f"{section}: nothing reads '{key}'"


def keys(value: object) -> Iterator[str]:
    """Every key of nested mappings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)
