"""The matrix of runs, what names a result, and the page that is written of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from experiments import ablation, document
from experiments.matrix import FILE, Matrix, read_matrix
from runtime.errors import UserError
from runtime.params import Params, parse
from train.recipe import ModelParams, TrainParams

PARAMS = yaml.safe_load(Path("params.yaml").read_text())


@pytest.fixture
def matrix() -> Matrix:
    return read_matrix()


@pytest.fixture
def params() -> Params:
    return Params.read()


def test_rows_are_the_paper_s_and_change_one_thing_each(matrix: Matrix):
    rows = [name for name, run in matrix.runs.items() if run.kind == "ablation"]
    assert rows == ["visual", "textual", "fusion", "cscl", "macl", "both"]
    jobs = {job.name: ablation.merged(PARAMS, job.overlay) for job in ablation.jobs_of(matrix, [], 1)}
    switches = {
        name: (
            tree["model"]["textual"],
            tree["model"]["tv_fusion"],
            tree["train"]["objective"]["cscl"],
            tree["train"]["objective"]["macl"],
        )
        for name, tree in jobs.items()
        if name in rows
    }
    assert switches == {
        "visual": (False, False, False, False),
        "textual": (True, False, False, False),
        "fusion": (True, True, False, False),
        "cscl": (True, True, True, False),
        "macl": (True, True, False, True),
        "both": (True, True, True, True),
    }


def test_every_run_is_a_valid_set_of_params_with_the_same_budget(matrix: Matrix):
    budgets = set()
    for job in ablation.jobs_of(matrix, [], None):
        tree = ablation.merged(PARAMS, job.overlay)
        parse("model", tree["model"], ModelParams)
        train = parse("train", tree["train"], TrainParams)
        assert train.seed == job.seed
        budgets.add((train.steps, train.batch, train.learning_rate, train.schedule))
    assert len(budgets) == 1


def test_paper_s_numbers_are_those_of_its_table(matrix: Matrix):
    methods, _, rows = (table["rows"] for table in json.loads(Path("eval/report/published.json").read_text())["tables"])
    told = [run.paper for run in matrix.runs.values() if run.paper and run.kind == "ablation"]
    assert told == [(row[4], row[6], row[1]) for row in rows]
    of_methods = {row[0]: (row[4], row[6], row[1]) for row in methods}
    baselines = {run.title: run.paper for run in matrix.runs.values() if run.paper and run.kind == "baseline"}
    assert baselines == {"IP-Adapter-plus": of_methods["IP-Adapter-plus"]}
    assert of_methods["CustomContrast"] == matrix.runs["both"].paper


def test_first_seeds_come_before_second_ones(matrix: Matrix):
    seeds = [job.seed for job in ablation.jobs_of(matrix, [], None)]
    assert seeds == sorted(seeds)
    assert {job.name for job in ablation.jobs_of(matrix, ["both"], None)} == {"both"}
    assert len(ablation.jobs_of(matrix, [], 1)) == len(matrix.runs)


def test_result_counts_while_recipe_and_data_are_the_same(matrix: Matrix, params: Params, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "RESULTS", tmp_path)
    job = ablation.jobs_of(matrix, ["both"], 1)[0]
    assert not ablation.is_done(job, params, matrix.world, "tables")
    done = {"run": "both", "seed": 0, "recipe": ablation.recipe_of(job, params, matrix.world), "data": "tables"}
    job.result.write_text(json.dumps(done))
    assert ablation.is_done(job, params, matrix.world, "tables")
    assert ablation.current_results(matrix, params, "tables") == [done]
    assert not ablation.is_done(job, params, matrix.world, "other tables")
    assert not ablation.is_done(job, params, {}, "tables")
    others = Params.read(settings=["train.learning_rate=0.5"])
    assert not ablation.is_done(job, others, matrix.world, "tables")
    assert ablation.current_results(matrix, others, "tables") == []  # a page of today's params does without it


@pytest.mark.parametrize("value", ["score.margin=0.3", "mask.min_detection=0.5", "views.timestep=9"])
def test_another_way_to_measure_makes_other_results_but_trains_nothing_again(value, matrix: Matrix, params: Params):
    before = ablation.circumstances(params, "tables", matrix.world)
    assert ablation.circumstances(params, "tables", matrix.world) == before
    assert ablation.circumstances(params, "other tables", matrix.world).name != before.name
    after = ablation.circumstances(Params.read(settings=[value]), "tables", matrix.world)
    assert after.name != before.name
    assert (after.tables, after.weights) == (before.tables, before.weights)


def test_weights_are_part_of_the_circumstances(matrix: Matrix, params: Params, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    before = ablation.circumstances(params, "tables", matrix.world)
    monkeypatch.setattr(ablation, "JUDGE", tmp_path)
    after = ablation.circumstances(params, "tables", matrix.world)
    assert after.weights != before.weights and after.name != before.name


def test_stages_get_the_command_line_s_values_and_the_run_s_on_top(matrix: Matrix, tmp_path):
    job = ablation.jobs_of(matrix, ["macl"], 1)[0]
    asked = Params.read(settings=["train.batch=8", "train.steps=7"])
    ablation.write_overlay(tmp_path, asked, job.overlay, matrix.world)
    written = yaml.safe_load((tmp_path / "overlay.yaml").read_text())
    assert (written["train"]["batch"], written["train"]["steps"]) == (8, 640)
    assert written["train"]["objective"]["cscl"] is False
    assert written["sources"] == matrix.world["sources"]
    assert written["run"]["work"] == str(tmp_path / "work")
    given = Params.read([str(tmp_path / "overlay.yaml")])
    assert given.section("train", TrainParams).batch == 8, "a stage takes it"


def test_results_of_different_data_share_no_page(matrix: Matrix, params: Params, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "RESULTS", tmp_path)
    for job, data in zip(ablation.jobs_of(matrix, ["cscl", "macl"], 1), ("one", "other"), strict=True):
        made = {"run": job.name, "seed": 0, "recipe": ablation.recipe_of(job, params, matrix.world), "data": data}
        job.result.write_text(json.dumps(made))
    for run, data in (("cscl", "one"), ("macl", "other")):
        assert [result["run"] for result in ablation.current_results(matrix, params, data)] == [run]
    with pytest.raises(UserError, match=r"(cscl-0 and macl-0|macl-0 and cscl-0) were trained on different data"):
        ablation.current_results(matrix, params, "a third")
    (tmp_path / "macl-0.json").unlink()
    assert [result["run"] for result in ablation.current_results(matrix, params, "a third")] == ["cscl"]


def test_page_says_that_its_results_are_of_earlier_backbones(matrix: Matrix, tmp_path):
    for data, told in (("now", False), ("another", True)):
        results = [result("both", 0, 0.5) | {"data": data}]
        document.write_document(matrix, results, "now", tmp_path / "page.md")
        assert ("results are of an earlier training" in (tmp_path / "page.md").read_text()) is told


@pytest.mark.slow
def test_failed_stage_is_one_sentence_with_its_last_line(tmp_path):
    (tmp_path / "overlay.yaml").write_text("train: {stpes: 1}\n")
    with pytest.raises(UserError, match=r"train of .* ended with code 1 \(error: .*unknown key 'train\.stpes'"):
        ablation.command("train", tmp_path, tmp_path, tmp_path / "log.txt")


def test_comparison_with_no_run_is_refused(tmp_path):
    tree = yaml.safe_load(FILE.read_text())
    tree["runs"]["both"]["against"] = "nothing"
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="both is compared with 'nothing', which is not a run"):
        read_matrix(tmp_path / "ablation.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bth"], r"there is no run 'bth' in ablation\.yaml; choose from visual, textual"),
        (["--jobs", "0"], "--jobs is 0; give at least 1"),
    ],
)
def test_bad_options_are_one_sentence(words: list[str], message: str):
    with pytest.raises(UserError, match=message):
        ablation.main(words)


def result(run: str, seed: int, value: float) -> dict:
    columns = ("E-CI", "E-DI", "CT", "IR", "R-CI", "R-DI")
    return {
        "run": run,
        "seed": seed,
        "data": "tables",
        "minutes": {"train": 5.0, "measure": 1.0},
        "train": {"steps": 640},
        "score": {"customcontrast": {name: {"mean": value} for name in columns} | {"pictures": 240}},
        "views": {
            "subjects": 24,
            "s_plus": {"auc": 0.9, "auc_same_class": None},
            "image_encoder": {"auc": 0.8, "auc_same_class": 0.7},
        },
        "truth": {
            "kept": {"family": value, "colour": value, "pattern": value},
            "followed": dict.fromkeys(("scene", "style", "accessory", "shape"), value),
            "pose": {"same_pose": 0.3, "chance": 0.2},
        },
    }


def test_page_holds_means_spreads_and_what_is_missing(matrix: Matrix, tmp_path):
    runs = {"fusion": (0.50, 0.52, 0.54), "both": (0.60, 0.62, 0.64), "factor-none": (0.55,)}
    runs |= {"ip-adapter-plus": (0.70, 0.71, 0.72), "self-reconstruction": (0.5, 0.7)}
    results = [result(run, seed, value) for run, values in runs.items() for seed, value in enumerate(values)]
    document.write_document(matrix, results, "tables", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| MFI encoder + CSCL + MACL | 3 | 0.620 ± 0.020 |" in text
    assert "E-CI +0.100 ± 0.000 (paper +0.034), holds" in text
    assert (
        "**MFI encoder + CSCL + MACL**, against IP-Adapter-plus: E-CI -0.090 ± 0.006 (paper +0.022), does not hold"
        in text
    )
    assert "against self-reconstruction (target = reference): E-CI +0.010 ± 0.090, within the spread of seeds" in text
    assert "Not run yet: visual (seed 0, 1, 2), textual" in text and "both (seed" not in text
    assert "10,240 samples" in text


@pytest.mark.parametrize(
    ("theirs", "changes", "words"),
    [
        (0.1, [0.4, 0.5], "+0.450 ± 0.050 (paper +0.100), holds"),
        (-0.1, [0.4, 0.5], "does not hold"),
        (0.1, [0.09, 0.3], "+0.195 ± 0.105 (paper +0.100), within the spread"),
        (0.1, [0.11, 0.3], "+0.205 ± 0.095 (paper +0.100), holds"),
        (0.1, [0.35], "the same direction with one seed"),
        (None, [0.4, 0.5], "+0.450 ± 0.050, beyond the spread of seeds"),
        (None, [0.35], "+0.350, one seed"),
        (0.1, [], "no seed in common"),
    ],
)
def test_verdict_by_hand(theirs, changes, words):
    assert words in document.verdict(theirs, changes)
