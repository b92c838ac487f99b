"""What is measured of each run, what counts as measured, and how runs are trained on."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from experiments.ablation import experiment, runner, stages
from experiments.ablation.experiment import Experiment, merged
from experiments.ablation.matrix import FILE, SEARCH, read_matrix
from runtime.errors import UserError
from runtime.params import Params, parse
from tests.world.tables import frame, mask, write
from train.recipe import ModelParams, TrainParams

ROWS = ["both", "visual", "fusion", "textual", "cscl", "macl"]


def experiment_with(*settings: str, photos: str = "photos", file: Path = FILE) -> Experiment:
    return Experiment(read_matrix(file), Params.read(settings=list(settings)), file.stem, photos)


@pytest.fixture
def planned() -> Experiment:
    return experiment_with()


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of results."""
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    return tmp_path


def test_rows_are_the_paper_s_and_change_one_thing_each(planned: Experiment):
    trees = {job.name: job.tree for job in planned.jobs(seeds=1) if job.run.kind == "ablation"}
    switches = {
        name: (*(tree["model"][key] for key in ("textual", "tv_fusion")), *(o[key] for key in ("cscl", "macl")))
        for name, tree in trees.items()
        for o in [tree["train"]["objective"]]
    }
    assert switches == {
        "visual": (False, False, False, False),
        "textual": (True, False, False, False),
        "fusion": (True, True, False, False),
        "cscl": (True, True, True, False),
        "macl": (True, True, False, True),
        "both": (True, True, True, True),
    }


def test_rows_of_a_method_share_its_hyperparameters(planned: Experiment):
    same = {
        (t["learning_rate"], t["weight_decay"], t["objective"]["location_weight"], t["objective"]["contrastive_weight"])
        for job in planned.jobs()
        if job.name in ROWS
        for t in [job.tree["train"]]
    }
    assert len(same) == 1


def test_every_run_is_a_valid_set_of_params_and_its_checkpoints_are_finished_adapters(planned: Experiment):
    for of in (planned, experiment_with(file=SEARCH)):
        for job in of.jobs():
            parse("model", job.tree["model"], ModelParams)
            train = parse("train", job.tree["train"], TrainParams)
            assert (train.seed, train.schedule) == (job.seed, "constant") and train.ema is not None
            counts = of.matrix.counts(job.name)
            assert counts == sorted(set(counts)) and not any(count % train.samples for count in counts)


def test_paper_s_numbers_are_those_of_its_tables(planned: Experiment):
    methods, _, rows = (table["rows"] for table in json.loads(Path("eval/report/published.json").read_text())["tables"])
    told = [planned.matrix.runs[name].paper for name in ("visual", "textual", "fusion", "cscl", "macl", "both")]
    assert told == [(row[4], row[6], row[1]) for row in rows]
    of_methods = {row[0]: (row[4], row[6], row[1]) for row in methods}
    assert planned.matrix.runs["ip-adapter-plus"].paper == of_methods["IP-Adapter-plus"]


def test_first_seeds_come_before_second_ones(planned: Experiment):
    places = [planned.matrix.plan(job.name).seeds.index(job.seed) for job in planned.jobs()]
    assert places == sorted(places)
    assert {job.name for job in planned.jobs(["both"])} == {"both"}
    assert len(planned.jobs(seeds=1)) == len(planned.matrix.runs)


def places(experiment: Experiment, name: str, seed: int) -> list[tuple[int, str]]:
    (job,) = (job for job in experiment.jobs([name]) if job.seed == seed)
    return [(one.samples, one.point) for one in job.wanted()]


def test_first_seed_is_measured_at_all_points_and_then_along_its_learning_curve(planned: Experiment):
    both = planned.jobs(["both"], 1)[0].wanted()
    assert [(one.samples, one.point, one.generate, one.further) for one in both] == [
        (10000, "own", {}, False),
        (10000, "strength-0.6", {"strength": 0.6}, False),
        (10000, "strength-1.4", {"strength": 1.4}, False),
        (20000, "own", {}, True),
        (40000, "own", {}, True),
    ]
    assert places(planned, "fusion", 0) == [(10000, "own")]
    assert places(planned, "location", 0) == [(10000, "own"), (10000, "unmasked")]


def test_other_seeds_are_measured_where_runs_are_compared(planned: Experiment):
    at = [(10000, point) for point in ("own", "strength-0.6", "strength-1.4")]
    for name in ("both", "ip-adapter-plus", "self-reconstruction"):
        assert places(planned, name, 1) == at, "at equal CT"
    assert places(planned, "visual", 1) == [(10000, "own")] and len(places(planned, "visual", 0)) == 5
    assert [point for _, point in places(planned, "realcustom", 2)] == ["own", *planned.matrix.points["scopes"]]
    for name, run in planned.matrix.runs.items():
        for seed in planned.matrix.plan(name).seeds:
            assert places(planned, name, seed)[0] == places(planned, run.against or "both", seed)[0], (name, seed)


def test_each_measurement_is_recorded_at_once_and_counts_while_all_it_depends_on_is_the_same(results: Path):
    job = experiment_with().jobs(["both"], 1)[0]
    first, second, *_ = job.wanted()
    mine = runner.Runner(job, results)
    mine.record(first, {"scores": {}})
    assert job.missing()[0] == second and len(job.missing()) == len(job.wanted()) - 1
    mine.record(second, {"scores": {}})
    assert [one["point"] for one in experiment.read_json(job.file)["measured"]] == ["own", "strength-0.6"]

    def left(*settings: str, **how: Any) -> int:
        other = experiment_with(*settings, **how).jobs(["both"], 1)[0]
        return len(other.wanted()) - len(other.missing())

    assert left() == 2
    assert left("train.checkpoint_every=7", "generate.processes=5", "train.ranks=1") == 2, "these change no result"
    for value in ("score.margin=0.3", "mask.min_detection=0.5", "views.timestep=9", "train.gradient_clipping=0.5"):
        assert left(value) == 0, value
    assert left(photos="others") == 0


def test_setting_that_is_newer_than_a_result_leaves_it_as_it_is_and_a_removed_one_does_not(results: Path):
    job = experiment_with().jobs(["both"], 1)[0]
    runner.Runner(job, results).record(job.wanted()[0], {})
    stored = experiment.read_json(job.file)
    del stored["settings"]["model.noun_weight"]
    job.file.write_text(json.dumps(stored))
    assert job.recorded() is not None
    stored["settings"]["model.gone"] = 1
    job.file.write_text(json.dumps(stored))
    assert job.recorded() is None


def test_weights_are_part_of_what_a_result_depends_on(planned: Experiment, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    before = planned.data
    monkeypatch.setattr(experiment.judge, "folder", lambda world: tmp_path)
    after = experiment_with().data
    assert after["photos"] == before["photos"] and after["weights"] != before["weights"]


def test_results_in_the_repository_are_of_its_weights_params_and_last_photos():
    for file in (FILE, SEARCH):
        current = experiment.experiment_of(file, Params.read())
        for result in sorted((experiment.RESULTS / file.stem).glob("*-[0-9].json")):
            jobs = {job.label: job for job in current.jobs()}
            assert result.stem in jobs, f"{result} is of no run of {file.name}; remove it"
            assert jobs[result.stem].recorded() is not None, f"{result} is of other data or settings; run make ablation"


def test_trials_are_on_other_subjects_than_the_ablation_and_as_many_for_each_method(planned: Experiment):
    search = experiment_with(file=SEARCH)
    assert search.matrix.world["toybox"]["seed"] != planned.params.tree()["toybox"]["seed"]
    titles = [run.title for run in search.matrix.runs.values()]
    assert {titles.count(title) for title in titles} == {5}


class Commands:
    """Records commands instead of running them, and writes what they would."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, dict[str, Any], tuple[str, ...]]] = []

    def __call__(self, modules: Sequence[str], overlay: Path, data: Path, log: Path, *words: str) -> None:
        tree = yaml.safe_load(overlay.read_text())
        self.ran += [(module, tree, words) for module in modules]
        if "train" in modules:
            (overlay.parent / "work" / "train" / "run").mkdir(parents=True)
            (overlay.parent / "work" / "train" / "run" / "recipe.json").write_text("{}")
            for name in ("summary.json", "metrics.json"):
                (data / "train").mkdir(exist_ok=True)
                (data / "train" / name).write_text("{}")


@pytest.fixture
def ran(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """The commands of a runner, which measure nothing, in an empty work folder."""
    commands = Commands()
    monkeypatch.setattr(runner, "command", commands)
    monkeypatch.setattr(runner, "scores_of", lambda data: {})
    monkeypatch.setattr(runner, "read_json", lambda file: {} if "metrics" in file.name else experiment.read_json(file))
    monkeypatch.setattr(experiment, "WORK", tmp_path / "work")
    return commands


def scored(bench: Path) -> Path:
    """Tables of evaluation subjects with a finished task of scoring."""
    (bench / "scored" / "run").mkdir(parents=True)
    (bench / "scored" / "run" / "task.parquet").write_bytes(b"")
    return bench


def test_run_is_trained_on_from_its_last_number_of_samples_and_measured_at_its_points(ran: Commands, tmp_path: Path):
    job = experiment_with().jobs(["ip-adapter-plus"], 1)[0]
    runner.Runner(job, scored(tmp_path / "bench"))(job.missing())
    trainings = [(tree["train"]["steps"], words) for module, tree, words in ran.ran if module == "train"]
    assert [steps for steps, _ in trainings] == [625, 1250, 2500]
    assert trainings[0][1] == () and [words[0] for _, words in trainings[1:]] == ["--resume", "--resume"]
    assert trainings[1][1][1].endswith("10000/work/train/run") and trainings[2][1][1].endswith("20000/work/train/run")
    generated = [tree["generate"] for module, tree, _ in ran.ran if module == "generate"]
    assert [of["strength"] for of in generated] == [1, 0.6, 1.4, 1, 1]
    modules = [module for module, _, _ in ran.ran]
    assert modules.count("views") == 1
    assert "location" not in modules, "it uses no masks"
    work = runner.Runner(job, tmp_path / "bench").folder / "10000" / "strength-0.6" / "work"
    assert (work / "score" / "run" / "task.parquet").is_file(), "the oracles are scored once for all"
    assert job.missing() == []


def test_location_masks_are_probed_where_they_are_used(ran: Commands, tmp_path: Path):
    job = experiment_with().jobs(["location"], 1)[0]
    runner.Runner(job, scored(tmp_path / "bench"))(job.missing())
    modules = [module for module, _, _ in ran.ran]
    assert modules.count("generate") == 2 and modules.count("location") == 1
    assert modules[modules.index("location") + 1] == "truth"  # which reads the maps


def test_all_that_is_compared_comes_before_learning_curves(results, tmp_path, monkeypatch):
    made: list[tuple[str, int]] = []

    class Recorder(runner.Runner):
        def __call__(self, measurements) -> None:
            made.extend((self.job.label, one.samples) for one in measurements)

    monkeypatch.setattr(runner, "Runner", Recorder)
    monkeypatch.setattr(runner, "prepare_world", lambda experiment: tmp_path)
    monkeypatch.setattr(runner, "write_document", lambda params: None)
    options = SimpleNamespace(runs=["both", "fusion"], seeds=2, jobs=1)
    runner.run_missing(experiment_with(), options)
    assert made == [
        *[("both-0", 10000)] * 3, ("fusion-0", 10000), *[("both-1", 10000)] * 3, ("fusion-1", 10000),
        ("both-0", 20000), ("both-0", 40000),
    ]  # fmt: skip


def test_photos_are_known_by_their_bytes_and_masks(tmp_path):
    def digest_of(name: str, **columns: Any) -> str:
        write(tmp_path / name / "curate", "frames", [frame("s/a/0", **columns), frame("s/a/1")])
        write(tmp_path / name / "mask", "masks", [mask("s/a/0"), mask("s/a/1")])
        return experiment.photos_digest(tmp_path / name)

    first = digest_of("one")
    assert digest_of("two", sharpness=0.5) == first, "a number that another processor may round otherwise"
    assert len({first, digest_of("three", sha256="0"), digest_of("four", mask_sha256="0")}) == 3


def test_run_with_an_encoder_of_its_own_gets_tables_of_its_own(ran: Commands, tmp_path: Path):
    planned = experiment_with()
    own, shared = (runner.Runner(planned.jobs([name], 1)[0], tmp_path) for name in ("realcustom-pp", "realcustom"))
    found = own.tables()
    ((module, tree, _),) = ran.ran
    assert module == "encode" and tree["encode"]["inputs"] == [] and tree["model"]["encoder"] == "realcustom_pp"
    assert tree["sources"] == planned.params.tree()["sources"], "the world that it is trained on"
    assert found["encode"].is_relative_to(own.folder) and found["pairs"] == planned.params.data / "pairs"
    assert shared.tables()["encode"] == planned.params.data / "encode" and len(ran.ran) == 1


def test_stages_get_the_command_line_s_values_and_the_run_s_on_top(tmp_path):
    job = experiment_with("train.batch=8", "train.schedule=cosine").jobs(["macl"], 1)[0]
    written = yaml.safe_load(runner.write_overlay(tmp_path, job.tree).read_text())
    assert (written["train"]["batch"], written["train"]["schedule"]) == (16, "constant")
    assert written["train"]["objective"]["cscl"] is False
    assert written["sources"] == job.experiment.matrix.world["sources"]
    assert written["run"]["work"] == str(tmp_path / "work")
    given = Params.read([str(tmp_path / "overlay.yaml")])
    assert given.section("train", TrainParams).batch == 16, "a stage takes it"


def test_mappings_are_merged_and_other_values_replaced():
    assert merged({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"c": [2]}}, {"d": 3}) == {"a": {"b": 1, "c": [2]}, "d": 3}


def test_stages_of_a_measurement_run_in_one_process_until_one_fails(monkeypatch: pytest.MonkeyPatch):
    told: list[list[str]] = []

    def command(words: Sequence[str]) -> None:
        told.append(list(words))
        if words[0] == "views":
            sys.exit(3)

    monkeypatch.setattr(stages.cli, "main", command)
    monkeypatch.setattr(stages.truth, "main", lambda words: told.append(["truth", *words]))
    with pytest.raises(SystemExit) as end:
        stages.main(["generate", "truth", "views", "score", "--", "--data", "here"])
    assert end.value.code == 3
    assert told == [[name, "--data", "here"] for name in ("generate", "truth", "views")]


@pytest.mark.slow
def test_failed_stage_is_one_sentence_with_its_last_line(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("train: {stpes: 1}\n")
    with pytest.raises(UserError, match=r"train of .* ended with code 1 \(error: .*unknown key 'train\.stpes'"):
        runner.command(("train",), overlay, tmp_path, tmp_path / "log.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": {"both": {"against": "nothing"}}}, "both is compared with 'nothing', which is not a run"),
        ({"runs": {"both": {"points": "nothing"}}}, "both has the points 'nothing', which are not there"),
        ({"plans": None}, "both is of kind 'ablation', which has no entry in plans"),
        (
            {"plans": {"reading": {"samples": 16}}},
            "location is compared with both, which is measured after another number",
        ),
    ],
)
def test_inconsistent_matrix_is_refused(change: dict[str, Any], message: str, tmp_path):
    tree = merged(yaml.safe_load(FILE.read_text()), change)
    tree["plans"] = tree["plans"] or {"baseline": {"seeds": [0], "samples": 16}}
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=message):
        read_matrix(tmp_path / "ablation.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bth"], r"there is no run 'bth' in ablation\.yaml; choose from both, ip-adapter-plus"),
        (["--jobs", "0"], "--jobs is 0; give at least 1"),
    ],
)
def test_bad_options_are_one_sentence(words: list[str], message: str):
    with pytest.raises(UserError, match=message):
        runner.main(words)
