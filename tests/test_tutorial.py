"""The tutorial runs from top to bottom, and what is stored of it is what a reader needs."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from runtime.closure import ROOT

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def test_stored_outputs_have_figures_and_no_path_of_a_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") >= 6 and kinds.count("image/svg+xml") == 4
    assert not [output for output in outputs if output.output_type == "error"]
    text = "".join(output.get("text", "") for output in outputs)
    assert not re.search(r"(^|[\\s'\"])/(home|root|tmp|work|Users)/", text)


@pytest.mark.slow
def test_tutorial_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("params.yaml", "weights", "docs", "pipelines", "model", "eval", "train", "runtime"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("customcontrast ", f"{sys.executable} {ROOT / 'customcontrast.py'} ")
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    adapter = tmp_path / ".work" / "tutorial" / "data" / "train" / "adapter"
    assert (adapter / "adapter.safetensors").is_file()
