"""Which other methods are trained, with which params, and where their adapters go."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from eval.generate.methods import METHODS, MODEL
from model.methods.registry import METHODS as TRAINED
from runtime.errors import UserError
from runtime.params import Params
from train.recipe import ModelParams
from train.rivals import stage


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The params of each training, which writes an adapter that holds its encoder's name; one in `failing` fails."""
    found: list[dict[str, Any]] = []

    def train(words: list[str], check: bool) -> SimpleNamespace:
        tree, data = yaml.safe_load(Path(words[words.index("--params") + 1]).read_text()), Path(words[-1])
        if words[2] == "pipelines.encode":
            assert tree["encode"]["inputs"] == [] and not (data / "encode").exists(), "it has tables of its own"
            (data / "encode").mkdir()
            (data / "encode" / "latents").touch()
            return SimpleNamespace(returncode=0)
        assert (data / "encode" / "latents").is_file(), "it reads the tables"
        assert (data / "encode").is_symlink() == bool(tree["encode"]["inputs"])
        found.append(tree)
        if tree["train"]["steps"] == 13:
            return SimpleNamespace(returncode=1)
        (data / "train" / "adapter").mkdir(parents=True)
        (data / "train" / "adapter" / "adapter.json").write_text(tree["model"]["encoder"])
        (data / "train" / "metrics.json").write_text(json.dumps({"total": 0.5}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", train)
    return found


def params(folder: Path, methods: list[str], *settings: str) -> Params:
    (folder / "data" / "encode").mkdir(parents=True, exist_ok=True)
    (folder / "data" / "encode" / "latents").touch()
    words = [f"generate.methods=[{', '.join(methods)}]", f"run.work={folder / 'work'}", "train.steps=7", *settings]
    return Params.read(settings=words, data=str(folder / "data"))


def test_methods_that_are_compared_are_trained_each_with_its_own_values(tmp_path: Path, ran: list[dict[str, Any]]):
    stage.main(params(tmp_path, ["customcontrast", "ip_adapter_plus", "prompt_only"]))
    (tree,) = ran
    assert tree["model"]["encoder"] == "ip_adapter_plus" and tree["train"]["objective"]["cscl"] is False
    assert tree["train"]["steps"] == 7 and tree["run"]["work"] == str(tmp_path / "work/rivals/ip_adapter_plus")
    out = tmp_path / "data" / "rivals"
    assert (out / "adapters/ip_adapter_plus/adapter.json").read_text() == "ip_adapter_plus"
    assert json.loads((out / "summary.json").read_text()) == {"ip_adapter_plus": 0.5}


def test_method_with_an_encoder_of_its_own_gets_tables_of_its_own(tmp_path: Path, ran: list[dict[str, Any]]):
    stage.main(params(tmp_path, ["realcustom_pp", "realcustom"]))
    assert [tree["model"]["encoder"] for tree in ran] == ["realcustom_pp", "realcustom"]
    assert ran[0]["train"]["curriculum"]["schedule"] == "linear" and ran[1]["train"]["pairing"] == "self"


def test_nothing_is_trained_where_none_is_compared_and_what_is_left_of_others_goes(tmp_path: Path, ran):
    stage.main(params(tmp_path, ["ip_adapter_plus"]))
    stage.main(params(tmp_path, ["customcontrast", "prompt_only"]))
    assert len(ran) == 1 and not list((tmp_path / "data/rivals/adapters").iterdir())


def test_failed_training_is_one_sentence_and_keeps_what_was_trained_before(tmp_path: Path, ran):
    stage.main(params(tmp_path, ["ip_adapter_plus"]))
    with pytest.raises(UserError, match="train of ip_adapter_plus failed; the same command resumes it"):
        stage.main(params(tmp_path, ["ip_adapter_plus"], "train.steps=13"))
    assert (tmp_path / "data/rivals/adapters/ip_adapter_plus/adapter.json").is_file()


def test_every_rival_is_a_method_of_both_training_and_images():
    found = Params.read()
    rivals = found.section("rivals", stage.RivalsParams)
    assert {*rivals, MODEL} <= set(METHODS)
    assert {values["model"]["encoder"] for values in rivals.values()} | {"mfi"} == set(TRAINED)
    for values in rivals.values():
        ModelParams.model_validate(found.tree()["model"] | values["model"])
