"""The documents of the methods name what there is: files, code, parameters with their defaults, tests, numbers."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from model.adapter import Adapter
from model.methods.config import AdapterConfig
from model.pipeline.pipeline import CustomContrastPipeline
from tests.world.models import sd15_unet, sdxl_unet

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "model.md"
TEXT = "".join((ROOT / "docs" / name).read_text() for name in ("model.md", "realcustom.md", "people.md"))
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
LINKS = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", TEXT)
TABLE = [line.split(" | ") for line in TEXT.splitlines() if re.search(r"\| [PRC]: |\| [PC][,.] ", line)]
PARAMETERS = [name for row in TABLE for name in re.findall(r"`(\w+[.(][^`]+)`", row[2])]
TESTS = [
    (name, file)
    for line in DOC.read_text().splitlines()
    for names, file in re.findall(r"((?:`test_\w+`,? ?)+)\(\[[\w.]+\]\(([^)]+)\)\)", line)
    for name in re.findall(r"`(\w+)`", names)
]


@cache
def definitions(file: Path) -> set[str]:
    """Functions, classes and methods of a module, `Class.method` for the last."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("label", "target"), LINKS)
def test_linked_file_holds_what_the_link_names(label, target):
    if not target.startswith("https://"):
        file = DOC.parent / target
        assert file.is_file()
        if label.startswith("`"):
            assert label.strip("`") in definitions(file.resolve())


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_parameter_exists_with_the_default_that_is_written(parameter):
    if call := re.fullmatch(r"pipeline\((\w+)=(.+)\)", parameter):
        found = inspect.signature(CustomContrastPipeline.__call__).parameters[call[1]].default
        assert found == ast.literal_eval(call[2])
        return
    path, _, written = parameter.partition(": ")
    first, *rest = path.split(".")
    if first == "AdapterConfig":
        assert rest[0] in AdapterConfig.__dataclass_fields__
        return
    value = PARAMS[first]
    for key in rest:
        value = value[key]
    assert not written or value == yaml.safe_load(written), "the document and params.yaml differ"


@pytest.mark.parametrize(("name", "file"), TESTS)
def test_test_that_is_named_exists(name, file):
    assert name in definitions((DOC.parent / file).resolve())


def test_every_row_and_test_name_was_read():
    assert len(TABLE) == 22 + 17 + 14 and len(PARAMETERS) > 60
    assert len(TESTS) == len(re.findall(r"`test_\w+`", DOC.read_text()))


@pytest.mark.parametrize(("make", "text_widths"), [(sd15_unet, (768,)), (sdxl_unet, (768, 1280))], ids=["sd15", "sdxl"])
def test_numbers_of_parameters_are_those_of_the_published_sizes(make, text_widths):
    with torch.device("meta"):
        adapter = Adapter.for_unet(
            make(),
            base_model="real",
            base_revision=None,
            image_encoder="ViT-H-14",
            feature_layers=(8, 20, 30),
            feature_width=1280,
            text_widths=text_widths,
        )
    for part in (adapter, adapter.mfi, adapter.projections):
        assert f"{sum(parameter.numel() for parameter in part.parameters()):,}" in DOC.read_text()
