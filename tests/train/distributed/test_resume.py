from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import UserError
from tests.world.ranks import run_ranks
from tests.world.training import write_options, write_world
from train.distributed.checkpoint import PROGRESS, STATE, Checkpoints
from train.distributed.resume import ResumeOptions, accept, differences, run_folder, unfinished

RECIPE = {"train": {"steps": 9, "seed": 0, "drop": {"text": 0.1}}, "data": "a", "ranks": [2, "cpu"]}
FOLLOW = ResumeOptions(Path("there"), other_ranks=False)


def changed(**values: Any) -> dict[str, Any]:
    return RECIPE | values


def test_differences_name_each_key_with_both_values():
    other = changed(data="b", train={"steps": 9, "drop": {"text": 0.2}, "ema": 0.9})
    assert differences(RECIPE, other) == {
        "data": ("a", "b"), "train.drop.text": (0.1, 0.2), "train.ema": (None, 0.9), "train.seed": (0, None)
    }  # fmt: skip


def test_runs_of_other_recipes_lie_in_other_folders(tmp_path: Path):
    folder = run_folder(tmp_path, RECIPE)
    assert json.loads((folder / "recipe.json").read_text()) == RECIPE
    assert run_folder(tmp_path, RECIPE) == folder
    assert run_folder(tmp_path, changed(data="b")) != folder


def test_checkpoint_of_another_run_is_refused_with_keys_and_values(tmp_path: Path):
    folder = run_folder(tmp_path, RECIPE)
    assert accept(folder, RECIPE, FOLLOW) == ""
    assert accept(folder / "step-000000003", RECIPE, FOLLOW) == ""
    with pytest.raises(
        UserError, match=r"belongs to another run: train\.seed is 0 there and 1 here; data is a there and b here"
    ):
        accept(folder, changed(data="b", train=RECIPE["train"] | {"seed": 1}), FOLLOW)


def test_other_ranks_are_accepted_only_when_asked_for_and_alone(tmp_path: Path):
    folder = run_folder(tmp_path, RECIPE)
    asked = ResumeOptions(folder, other_ranks=True)
    with pytest.raises(
        UserError, match=r"ranks is 2 cpu there and 1 cpu here; make them equal \(or give --other-ranks\)"
    ):
        accept(folder, changed(ranks=[1, "cpu"]), FOLLOW)
    assert "not bit-identical to an uninterrupted run" in accept(folder, changed(ranks=[1, "cpu"]), asked)
    with pytest.raises(UserError, match="data is a there and b here; make them equal, or"):
        accept(folder, changed(ranks=[1, "cpu"], data="b"), asked)


def test_more_steps_are_accepted_where_the_learning_rate_does_not_depend_on_their_number(tmp_path: Path):
    constant, cosine = ({**RECIPE["train"], "schedule": schedule} for schedule in ("constant", "cosine"))
    folder = run_folder(tmp_path, changed(train=constant))
    longer = changed(train=constant | {"steps": 20})
    assert accept(folder, longer, FOLLOW) == "train: going on to step 20 from a run of 9"
    notices = accept(folder, longer | {"ranks": [1, "cpu"]}, ResumeOptions(folder, other_ranks=True))
    assert "going on to step 20" in notices and "made by ranks 2 cpu" in notices
    with pytest.raises(UserError, match=r"train\.seed is 0 there and 1 here; make"):
        accept(folder, changed(train=constant | {"steps": 20, "seed": 1}), FOLLOW)
    with pytest.raises(UserError, match=r"train\.steps is 9 there and 20 here; train\.schedule is constant there"):
        accept(folder, changed(train=cosine | {"steps": 20}), FOLLOW)
    course = {"curriculum": {"schedule": "linear"}}  # which depends on it
    folder = run_folder(tmp_path, changed(train=constant | course))
    with pytest.raises(UserError, match=r"train\.steps is 9 there and 20 here; make"):
        accept(folder, changed(train=constant | course | {"steps": 20}), FOLLOW)
    folder = run_folder(tmp_path, changed(train=cosine))
    with pytest.raises(UserError, match=r"train\.steps is 9 there and 20 here; make"):
        accept(folder, changed(train=cosine | {"steps": 20}), FOLLOW)


def test_folder_without_recipe_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"contains no recipe\.json"):
        accept(tmp_path, RECIPE, FOLLOW)


def test_new_run_is_told_how_the_newest_unfinished_one_differs(tmp_path: Path):
    ours = run_folder(tmp_path, RECIPE)
    assert unfinished(tmp_path, ours, RECIPE) == ""
    (run_folder(tmp_path, changed(data="old")) / "step-000000009").mkdir()  # it ended
    assert unfinished(tmp_path, ours, RECIPE) == ""
    other = run_folder(tmp_path, changed(data="b", train=RECIPE["train"] | {"seed": 1}))
    (other / "step-000000003").mkdir()
    assert f"{other} differs in train.seed, data" in unfinished(tmp_path, ours, RECIPE)


def test_option_about_no_checkpoint_is_refused():
    with pytest.raises(UserError, match="name its folder with --resume"):
        ResumeOptions.of(None, other_ranks=True)


def test_named_checkpoints_that_are_all_damaged_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = tmp_path / "source"
    for step in (2, 4):
        checkpoint = source / f"step-{step:09d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / STATE).write_bytes(b"cut off")
        (checkpoint / PROGRESS).write_text(json.dumps({"step": step, "digest": "of more bytes"}))
    checkpoints = Checkpoints(tmp_path / "own", None, source)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no intact checkpoint"):
        checkpoints.newest()
    said = capsys.readouterr().out
    assert said.index("step-000000004 is damaged") < said.index("step-000000002 is damaged")


@pytest.fixture(scope="module")
def ended(variant: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two ranks: four steps, a checkpoint after each second one."""
    folder = tmp_path_factory.mktemp("resume")
    write_world(folder / "data", views=10, single=2)
    assert start(folder, variant)[0] == [0, 0]
    return folder


def start(folder: Path, variant: Path, *words: str, **train: Any) -> tuple[list[int | None], str]:
    """Train in a folder; return exit codes and what was said."""
    values = {"steps": 4, "schedule": "constant", "checkpoint_every": 2, "ranks": 2, **train}
    options = write_options(folder, variant, folder / "data", **values)
    output = folder / "output"
    output.unlink(missing_ok=True)
    return run_ranks(values["ranks"], [*options, *words], output), output.read_text()


def tables_of(ended: Path, folder: Path) -> Path:
    """A folder with the same tables and no run."""
    shutil.copytree(ended / "data", folder / "data", ignore=shutil.ignore_patterns("train"))
    return folder


def run_of(folder: Path) -> Path:
    """The folder of checkpoints of the only run."""
    (recipe,) = folder.glob("work/train/*/recipe.json")
    return recipe.parent


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_truncated_checkpoint_is_passed_over_with_a_line(ended: Path, variant: Path, tmp_path: Path):
    folder = Path(shutil.copytree(ended, tmp_path / "run"))
    outs = [folder / "data" / "train" / name for name in ("adapter/adapter.safetensors", "losses.csv")]
    before = [out.read_bytes() for out in outs]
    newest = run_of(folder) / "step-000000004" / STATE
    newest.write_bytes(newest.read_bytes()[:1000])
    codes, said = start(folder, variant)
    assert codes == [0, 0]
    assert said.count("step-000000004 is damaged; skipping it") == 1 and "resuming at step 2 of 4" in said
    assert [out.read_bytes() for out in outs] == before


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_named_checkpoint_of_other_params_stops_all_ranks_with_one_sentence(ended: Path, variant: Path, tmp_path: Path):
    words = ["--resume", str(run_of(ended))]
    codes, said = start(tables_of(ended, tmp_path), variant, *words, learning_rate=0.5)
    assert codes == [1, 1]
    assert said.count("error:") == 1 and "Traceback" not in said
    assert "train.learning_rate is 0.001 there and 0.5 here" in said


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_run_goes_on_with_other_ranks_when_asked_for(ended: Path, variant: Path, tmp_path: Path):
    words = ["--resume", str(run_of(ended) / "step-000000002"), "--other-ranks"]
    codes, said = start(tables_of(ended, tmp_path), variant, *words, ranks=1)
    assert codes == [0], said
    assert "made by ranks 2 cpu and is resumed on 1 cpu" in said and "resuming at step 2 of 4" in said


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_finished_run_is_trained_on_to_the_bytes_of_a_longer_one(ended: Path, variant: Path, tmp_path: Path):
    folder = tables_of(ended, tmp_path)
    assert start(folder, variant, steps=2)[0] == [0, 0]
    codes, said = start(folder, variant, "--resume", str(run_of(folder)))
    assert codes == [0, 0], said
    assert "going on to step 4 from a run of 2" in said and "resuming at step 2 of 4" in said
    for name in ("adapter/adapter.safetensors", "losses.csv", "metrics.json"):
        assert (folder / "data" / "train" / name).read_bytes() == (ended / "data" / "train" / name).read_bytes()
    codes, said = start(folder, variant, "--resume", str(run_of(ended)), steps=3)
    assert codes == [1, 1] and "the checkpoint is of step 4, beyond train.steps = 3" in said
