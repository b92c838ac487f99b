"""params.yaml is read strictly, and what is wrong is said in one sentence that names the key."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime import params
from runtime.errors import UserError
from runtime.params import Section


class Inner(Section):
    low: float
    high: float


class Demo(Section):
    count: int
    inner: Inner


GOOD = "demo: {count: 3, inner: {low: 0.5, high: 1.0}}\nother: {a: 1}\n"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run with a params.yaml of this text and these command line words."""

    def use(text: str, *words: str) -> None:
        params._tree.cache_clear()
        (tmp_path / "params.yaml").write_text(text)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["stage", *words])

    yield use
    params._tree.cache_clear()


def test_section_is_read_with_overlays_and_single_values(command, tmp_path: Path):
    (tmp_path / "more.yaml").write_text("demo: {inner: {low: 0.25}}\n")
    command(GOOD, "--params", str(tmp_path / "more.yaml"), "--set", "demo.count=7")
    demo = params.load("demo", Demo)
    assert (demo.count, demo.inner.low, demo.inner.high) == (7, 0.25, 1.0)


@pytest.mark.parametrize("before", ["{}", "{mine: {path: x}, yours: {path: y}}"])
@pytest.mark.parametrize("after", [{}, {"mine": {"path": "z"}}, {"other": {"path": "x"}}])
def test_mapping_whose_keys_are_free_is_replaced(command, tmp_path: Path, before: str, after: dict[str, Any]):
    text = f"score: {{encoders: {before}, miss: zero}}\n"
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"score": {"encoders": after}}))
    command(text, "--params", str(tmp_path / "more.yaml"))
    assert params.load("score", dict) == {"encoders": after, "miss": "zero"}
    command(text, "--set", f"score.encoders={after}")
    assert params.load("score", dict) == {"encoders": after, "miss": "zero"}
    command(text, str(tmp_path / "more.yaml"))
    params.main()
    assert yaml.safe_load((tmp_path / "params.yaml").read_text()) == {"score": {"encoders": after, "miss": "zero"}}


def test_free_mappings_are_in_the_repository_params():
    tree = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
    for name in params.FREE_MAPPINGS:
        assert isinstance(functools.reduce(dict.__getitem__, name.split("."), tree), dict)


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        (GOOD.replace("low", "lwo"), (), "unknown key 'demo.inner.lwo'|key 'demo.inner.low' is missing"),
        (GOOD.replace("low: 0.5, ", ""), (), "key 'demo.inner.low' is missing; add it"),
        (GOOD.replace("3", "three"), (), "'demo.count' is 'three'"),
        ("other: {a: 1}\n", (), "no section 'demo'"),
        ("demo: [", (), "not valid YAML"),
        ("- 1\n", (), "holds no sections"),
        (GOOD, ("--set", "demo.cuont=1"), "unknown key 'cuont'"),
        (GOOD, ("--set", "demo.inner={lwo: 1}"), "unknown key 'lwo'"),
        ("demo: {}\n", ("--set", "demo.count=1"), "unknown key 'count'"),
        (GOOD, ("--set", "demo.count"), "write KEY=VALUE"),
        (GOOD, ("--set", "demo.count={"), "the value is not YAML"),
        (GOOD, ("--params", "nowhere.yaml"), "nowhere.yaml does not exist"),
        (GOOD, ("--params", "."), r"\. cannot be read \(Is a directory\); name a YAML file"),
    ],
)
def test_wrong_params_are_one_sentence(command, text: str, words: tuple[str, ...], said: str):
    command(text, *words)
    with pytest.raises(UserError, match=said) as error:
        params.load("demo", Demo)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "setting", ["workers=0", "threads=0", "threads=-1", "device=gpu", "gpus_per_worker=-1", "restarts=-1"]
)
def test_work_that_nobody_could_do_is_refused(setting: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(sys, "argv", ["stage", "--set", f"run.{setting}"])
    with pytest.raises(UserError, match=f"'run.{setting.partition('=')[0]}' is "):
        params.load("run", params.RunParams)


def test_resolved_params_are_a_copy(command):
    command(GOOD)
    params.resolved()["demo"]["count"] = 9
    assert params.load("demo", Demo).count == 3


def test_options_are_passed_on(command):
    command(GOOD, "--data", "elsewhere", "--set", "demo.count=4")
    assert params.passed_on() == ["--data", "elsewhere", "--set", "demo.count=4"]
    assert params.data_dir() == Path("elsewhere")


def test_main_ends_with_one_sentence_and_exit_code_1(capsys: pytest.CaptureFixture[str]):
    def main() -> None:
        raise UserError("data/x is empty; run curate first")

    with pytest.raises(SystemExit) as stop:
        params.cli(main)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: data/x is empty; run curate first\n"


@pytest.mark.parametrize("words", [(), ("--params", "configs/sd15.yaml"), ("--params", "configs/sdxl.yaml")])
def test_repository_params_are_valid_for_every_stage(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    from eval.generate.stage import GenerateParams
    from eval.probes.location.stage import LocationParams
    from eval.probes.views.stage import ViewsParams
    from eval.report.stage import ReportParams
    from eval.score.scorer import ScoreParams
    from pipelines.curate.stage import CurateParams
    from pipelines.encode.stage import EncodeParams
    from pipelines.mask.stage import MaskParams
    from pipelines.photos.roots import SourceParams
    from pipelines.similarity.stage import SimilarityParams
    from pipelines.toybox.stage import ToyboxParams
    from train.recipe import ModelParams, TrainParams

    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(sys, "argv", ["stage", *words])
    params._tree.cache_clear()
    models = {
        "sources": list[SourceParams],
        "backbones": params.BackbonesParams,
        "run": params.RunParams,
        "toybox": ToyboxParams,
        "curate": CurateParams,
        "mask": MaskParams,
        "similarity": SimilarityParams,
        "encode": EncodeParams,
        "model": ModelParams,
        "train": TrainParams,
        "generate": GenerateParams,
        "score": ScoreParams,
        "views": ViewsParams,
        "location": LocationParams,
        "report": ReportParams,
    }
    assert set(models) == set(params.resolved())
    for section, model in models.items():
        params.load(section, model)


def test_file_is_laid_over_params_for_good_with_comments_kept(command, tmp_path: Path):
    (tmp_path / "more.yaml").write_text("demo: {inner: {low: 0.25}}\n")
    text = "# top\ndemo:\n  count: 3 # why\n  inner:\n    low: 0.5 # low\n    high: 1.0\n"
    command(text, str(tmp_path / "more.yaml"))
    params.main()
    assert (tmp_path / "params.yaml").read_text() == text.replace("low: 0.5", "low: 0.25")
