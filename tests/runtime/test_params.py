"""params.yaml is read strictly, and what is wrong is said in one sentence that names the key."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime import params
from runtime.cli import guarded
from runtime.errors import UserError
from runtime.params import Params, RunParams, Section, lay_over, section_text

REPOSITORY = Path(__file__).parents[2]


class Inner(Section):
    low: float
    high: float


class Demo(Section):
    count: int
    inner: Inner


GOOD = "demo: {count: 3, inner: {low: 0.5, high: 1.0}}\nother: {a: 1}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`folder(text)`: work in a folder with a params.yaml of this text."""

    def use(text: str) -> Path:
        (tmp_path / "params.yaml").write_text(text)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return use


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_section_is_read_with_overlays_and_single_values(folder):
    (folder(GOOD) / "more.yaml").write_text("demo: {inner: {low: 0.25}}\n")
    demo = Params.read(["more.yaml"], ["demo.count=7"]).section("demo", Demo)
    assert (demo.count, demo.inner.low, demo.inner.high) == (7, 0.25, 1.0)


@pytest.mark.parametrize("before", ["{}", "{mine: {path: x}, yours: {path: y}}"])
@pytest.mark.parametrize("after", [{}, {"mine": {"path": "z"}}, {"other": {"path": "x"}}])
def test_mapping_whose_keys_are_free_is_replaced(folder, before: str, after: dict[str, Any]):
    here = folder(f"score: {{encoders: {before}, miss: zero}}\n")
    (here / "more.yaml").write_text(yaml.safe_dump({"score": {"encoders": after}}))
    assert Params.read(["more.yaml"]).section("score", dict) == {"encoders": after, "miss": "zero"}
    assert Params.read(settings=[f"score.encoders={after}"]).section("score", dict)["encoders"] == after
    lay_over(["more.yaml"])
    assert yaml.safe_load((here / "params.yaml").read_text()) == {"score": {"encoders": after, "miss": "zero"}}


def test_free_mappings_are_in_the_repository_params():
    tree = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    for name in params.FREE_MAPPINGS:
        assert isinstance(functools.reduce(dict.__getitem__, name.split("."), tree), dict)


@pytest.mark.parametrize(
    ("text", "files", "settings", "said"),
    [
        (GOOD.replace("low", "lwo"), [], [], "unknown key 'demo.inner.lwo'|key 'demo.inner.low' is missing"),
        (GOOD.replace("low: 0.5, ", ""), [], [], "key 'demo.inner.low' is missing; add it"),
        (GOOD.replace("3", "three"), [], [], "'demo.count' is 'three'"),
        (GOOD, [], ["demo.count=true"], "demo.count: it is true, not a number; correct it"),
        (GOOD, [], ["demo.inner.low=.nan"], "'demo.inner.low' is nan: input should be a finite number; correct it"),
        (GOOD, [], ["demo.inner.high=-.inf"], "'demo.inner.high' is -inf: input should be a finite number"),
        ("other: {a: 1}\n", [], [], "no section 'demo'"),
        ("demo: [", [], [], "not valid YAML"),
        ("- 1\n", [], [], "has no sections"),
        (GOOD, [], ["demo.cuont=1"], "unknown key 'demo.cuont'"),
        (GOOD, [], ["demo.inner={lwo: 1}"], "unknown key 'demo.inner.lwo'"),
        ("demo: {}\n", [], ["demo.count=1"], "unknown key 'demo.count'"),
        (GOOD, [], ["demo.count"], "write KEY=VALUE"),
        (GOOD, [], ["demo.count={"], "the value is not YAML"),
        (GOOD, ["nowhere.yaml"], [], "nowhere.yaml does not exist"),
        (GOOD, ["."], [], r"\. cannot be read \(Is a directory\); pass a readable YAML file"),
    ],
)
def test_wrong_params_are_one_sentence(folder, text: str, files: list[str], settings: list[str], said: str):
    folder(text)
    with pytest.raises(UserError, match=said) as error:
        Params.read(files, settings).section("demo", Demo)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 0.001), ("010", 10), ("yes", "yes"), ("3:30", "3:30")])
def test_numbers_are_read_as_dvc_reads_them(folder, text: str, value: Any):
    """DVC reads params.yaml as YAML 1.2; by the older rules 010 is 8, `yes` is true and 1e-3 a string."""
    from dvc.utils.serialize import load_yaml

    here = folder(f"demo: {{count: {text}}}\n")
    assert Params.read().tree()["demo"]["count"] == value == load_yaml(str(here / "params.yaml"))["demo"]["count"]
    folder("demo: {count: 0}\n")
    assert Params.read(settings=[f"demo.count={text}"]).tree()["demo"]["count"] == value


def test_a_key_given_twice_is_refused_with_its_line(folder):
    folder("demo:\n  count: 3\n  other: 1\n  count: 7\n")
    with pytest.raises(UserError, match=r"params.yaml, line 4: found duplicate key \"count\"; remove one of the two"):
        Params.read()


def test_home_is_expanded_in_every_path(folder, monkeypatch):
    here = folder(
        "run: {workers: 1, threads: 1, decoders: 0, device: cpu, gpus_per_worker: 0, restarts: 0, work: w,"
        " purpose: research}\n"
    )
    monkeypatch.setenv("HOME", str(here))
    (here / "more.yaml").write_text("run: {workers: 2}\n")
    found = Params.read(["~/more.yaml"], ["run.work=~/scratch"], "~/tables")
    assert (found.run.workers, found.run.work, found.data) == (2, str(here / "scratch"), here / "tables")
    assert Params.read(settings=["run.work=memory://w"]).run.work == "memory://w"


@pytest.mark.parametrize(
    "setting",
    [
        "workers=0",
        "threads=0",
        "threads=-1",
        "device=gpu",
        "gpus_per_worker=-1",
        "restarts=-1",
        "work=''",
        "purpose=sale",
    ],
)
def test_work_that_nobody_could_do_is_refused(repository, setting: str):
    with pytest.raises(UserError, match=f"'run.{setting.partition('=')[0]}' is "):
        _ = Params.read(settings=[f"run.{setting}"]).run


def test_tree_is_a_copy(folder):
    folder(GOOD)
    found = Params.read()
    found.tree()["demo"]["count"] = 9
    assert found.section("demo", Demo).count == 3


def test_words_make_another_command_read_the_same(folder):
    (folder(GOOD) / "more.yaml").write_text("demo: {count: 5}\n")
    words = Params.read(["more.yaml"], ["demo.inner.low=0.1"], "elsewhere").words()
    assert words == ["--data", "elsewhere", "--params", "more.yaml", "--set", "demo.inner.low=0.1"]
    assert Params.read(["more.yaml"], [], "elsewhere").data == Path("elsewhere")


@pytest.mark.parametrize(
    "setting",
    [
        *("curate.shard_subjects=0", "curate.max_pixels=0", "curate.captions.max_words=-1"),
        *("curate.filters.sharpness_side=0", "curate.filters.brightness=[249, 6]"),
        *("mask.batch_size=0", "mask.shard_subjects=-3", "similarity.batch_size=-1", "similarity.shard_subjects=0"),
        *("pairs.angle_band=[90, 15]", "pairs.order_band=[1, 0]"),
        *("encode.batch_size=0", "encode.shard_subjects=0", "encode.scale=[1, .5]"),
    ],
)
def test_sizes_that_no_stage_can_work_with_are_refused(repository, setting: str):
    from pipelines.curate.worker import CurateParams
    from pipelines.encode.worker import EncodeParams
    from pipelines.mask.worker import MaskParams
    from pipelines.pairs.triplets import TripletParams
    from pipelines.selfaugment.people import SelfAugmentParams
    from pipelines.similarity.worker import SimilarityParams

    models = {
        "selfaugment": SelfAugmentParams,
        "curate": CurateParams,
        "mask": MaskParams,
        "similarity": SimilarityParams,
        "pairs": TripletParams,
        "encode": EncodeParams,
    }
    key, section = setting.partition("=")[0], setting.partition(".")[0]
    with pytest.raises(UserError, match=key):
        Params.read(settings=[setting]).section(section, models[section])


@pytest.mark.parametrize(
    "files",
    [
        [],
        ["configs/sd15.yaml"],
        ["configs/sdxl.yaml"],
        ["configs/toybox_large.yaml"],
        ["configs/toybox_adapter.yaml"],
        ["configs/toybox_rivals.yaml"],
        ["configs/faces.yaml"],
    ],
)
def test_repository_params_are_valid_for_every_stage(repository, files: list[str]):
    from eval.generate.params import GenerateParams
    from eval.probes.location.stage import LocationParams
    from eval.probes.views.stage import ViewsParams
    from eval.report.sections import ReportParams
    from eval.score.scorer import ScoreParams
    from pipelines.curate.worker import CurateParams
    from pipelines.encode.worker import EncodeParams
    from pipelines.mask.worker import MaskParams
    from pipelines.pairs.triplets import TripletParams
    from pipelines.photos.roots import SourceParams
    from pipelines.selfaugment.people import SelfAugmentParams
    from pipelines.similarity.worker import SimilarityParams
    from pipelines.toybox.stage import ToyboxParams
    from train.recipe import ModelParams, TrainParams
    from train.rivals.stage import RivalsParams

    models: dict[str, Any] = {
        "sources": list[SourceParams],
        "backbones": params.BackbonesParams,
        "run": RunParams,
        "toybox": ToyboxParams,
        "curate": CurateParams,
        "mask": MaskParams,
        "similarity": SimilarityParams,
        "pairs": TripletParams,
        "encode": EncodeParams,
        "model": ModelParams,
        "train": TrainParams,
        "generate": GenerateParams,
        "score": ScoreParams,
        "views": ViewsParams,
        "location": LocationParams,
        "report": ReportParams,
        "rivals": RivalsParams,
        "selfaugment": SelfAugmentParams,
    }
    found = Params.read(files)
    assert set(models) == set(found.tree())
    for section, model in models.items():
        found.section(section, model)


def test_file_is_laid_over_params_for_good_with_comments_kept(folder):
    text = "# top\ndemo:\n  count: 3 # why\n  inner:\n    low: 0.5 # low\n    high: 1.0\n"
    here = folder(text)
    (here / "more.yaml").write_text("demo: {inner: {low: 0.25}}\n")
    lay_over(["more.yaml"])
    assert (here / "params.yaml").read_text() == text.replace("low: 0.5", "low: 0.25")


def test_full_disk_leaves_params_as_they_were(folder, monkeypatch: pytest.MonkeyPatch, capsys):
    here = folder(GOOD)
    (here / "more.yaml").write_text("demo: {inner: {low: 0.25}}\n")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: lay_over(["more.yaml"]))
    assert stop.value.code == 1
    assert (
        capsys.readouterr().err
        == f"error: {here}/params.yaml: no space left on its disk; free some and run the same command again\n"
    )
    assert (here / "params.yaml").read_text() == GOOD
    assert sorted(path.name for path in here.iterdir()) == ["more.yaml", "params.yaml"]


def test_link_to_params_stays_a_link(folder):
    here = folder(GOOD)
    (here / "params.yaml").rename(here / "own.yaml")
    (here / "params.yaml").symlink_to("own.yaml")
    (here / "more.yaml").write_text("demo: {count: 4}\n")
    lay_over(["more.yaml"])
    assert (here / "params.yaml").is_symlink()
    assert yaml.safe_load((here / "own.yaml").read_text())["demo"]["count"] == 4


def test_missing_params_say_where_they_were_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"params.yaml does not exist in {tmp_path}; run in the repository's folder"):
        Params.read()


def test_text_of_a_section_has_its_comments_and_nothing_of_the_next(folder):
    folder("first: 1\n\nsecond:\n  a: 1 # why\n  # more\n  b: 2\n\n# about the third\nthird: {}\n")
    assert section_text("second") == "second:\n  a: 1 # why\n  # more\n  b: 2"
    assert section_text("third") == "third: {}"
    assert section_text("fourth") == ""
