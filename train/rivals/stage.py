"""Stage: tables -> an adapter for each other method in generate.methods, trained as the train stage trains its own.

Each entry of section `rivals` overrides values of params.yaml; one train command a method does the work and resumes. An
entry with values of `encode` gets tables of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from runtime.errors import UserError
from runtime.files import write_metrics, write_text
from runtime.params import Params, overlay
from train.rivals import STAGE

RivalsParams = dict[str, dict[str, Any]]
"""Section `rivals`: by method, what it overrides."""

ADAPTERS = "adapters"
TABLES = tuple(dict.fromkeys(name.partition("/")[0] for name in STAGE.reads))
"""Stages whose tables training reads."""


def main(params: Params) -> None:
    """Run the stage."""
    methods = params.section("generate", dict[str, Any])["methods"]
    rivals = params.section("rivals", RivalsParams)
    out, named = params.data / STAGE.name, [name for name in methods if name in rivals]
    (out / ADAPTERS).mkdir(parents=True, exist_ok=True)
    for place in (out / ADAPTERS).iterdir():
        if place.name not in named:
            shutil.rmtree(place)
    losses = {name: trained(name, rivals[name], params, out / ADAPTERS / name) for name in named}
    write_metrics(out, losses, {name: found["total"] for name, found in losses.items()})
    print(f"rivals: {', '.join(named) or 'none in generate.methods'}")


def trained(name: str, values: dict[str, Any], params: Params, out: Path) -> dict[str, Any]:
    """Train a method's adapter into `out`; return the train stage's metrics.

    Raises:
        UserError: encode or train failed.
    """
    work = Path(params.run.work) / STAGE.name / name
    data = work / "data"
    data.mkdir(parents=True, exist_ok=True)
    own = ["encode"] if "encode" in values else []
    for stage in TABLES:
        if stage not in own:
            (data / stage).unlink(missing_ok=True)
            (data / stage).symlink_to((params.data / stage).resolve())
    tree, file = params.tree(), work / "params.yaml"
    overlay(tree, values | {"run": {"work": str(work)}}, f"rivals.{name}")
    write_text(file, yaml.safe_dump(tree, sort_keys=False))
    print(f"rivals: training {name}", flush=True)
    for module in (*(f"pipelines.{stage}" for stage in own), "train"):
        words = [sys.executable, "-m", module, "--params", str(file), "--data", str(data)]
        if subprocess.run(words, check=False).returncode:
            raise UserError(f"{module} of {name} failed; the same command resumes it, see the error above")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(data / "train" / "adapter", out)
    found: dict[str, Any] = json.loads((data / "train" / "metrics.json").read_text(encoding="utf-8"))
    return found
