"""The page and the lines of the check, from made-up results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.ablation import claims, document, experiment, figure, rivals
from experiments.ablation.experiment import Experiment, SeededRun
from experiments.ablation.intervals import Estimate
from experiments.ablation.matrix import FILE, SEARCH, read_matrix
from experiments.ablation.runner import Runner
from runtime.params import Params

SUBJECTS = [f"toy-{number}" for number in range(6)]
COLUMNS = ("E-CI", "E-DI", "CT", "IR", "R-CI", "R-DI")


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    return Experiment(read_matrix(), Params.read(), FILE.stem, "photos")


def record(
    job: SeededRun,
    similarity: float,
    control: float,
    *,
    pose: float = 0.2,
    auc: float = 0.9,
    outside: float = 0.05,
    rise: float = 0.3,
) -> None:
    """Record all measurements of a job: a weaker visual branch has less similarity and more control."""
    for wanted in job.wanted():
        trade = 0.1 * (wanted.generate.get("strength", 1.0) - 1)
        values = dict.fromkeys(COLUMNS, similarity + trade) | {"CT": control - trade}
        spread = {
            name: {subject: value + 0.01 * place for place, subject in enumerate(SUBJECTS)}
            for name, value in values.items()
        }
        found: dict[str, Any] = {
            "scores": spread,
            "truth": {
                "kept": dict.fromkeys(("family", "colour", "pattern"), 0.8),
                "followed": dict.fromkeys(("scene", "style", "accessory", "shape"), 0.9),
                "pose": {"same_pose": pose, "chance": 0.15},
                "outside": {"change": outside},
                "overlap": {"0": 0.2, "10": 0.2 + rise / 2, "19": 0.2 + rise},
            },
        }
        if wanted.own:
            found |= {"train": {"location": -0.3}}
            found |= {"views": {"s_plus": {"auc": auc, "auc_same_class": auc}}}
        Runner(job, Path()).record(wanted, found)


def by_name(planned: Experiment) -> dict[str, claims.Claim]:
    return {claim.name: claim for claim in claims.claims(planned)}


def test_page_without_results_says_what_is_missing(planned: Experiment):
    text = document.page(planned, Experiment(read_matrix(SEARCH), planned.params, SEARCH.stem, "photos"))
    assert "0 of 61 runs are complete" in text and "both (seed 0, 1, 2)" in text
    assert {claim.verdict for claim in claims.claims(planned)} == {"missing"}


def test_page_holds_tables_curves_verdicts_and_what_is_missing(planned: Experiment):
    for name, base in (("fusion", 0.50), ("both", 0.60), ("ip-adapter-plus", 0.70)):
        for job in planned.jobs([name]):
            record(job, base + 0.02 * job.seed, 0.65)
    text = document.page(planned, Experiment(read_matrix(SEARCH), planned.params, SEARCH.stem, "photos"))
    assert "9 of 61 runs are complete" in text
    assert (
        "| MFI encoder + CSCL + MACL | 3 | 0.645 ± 0.020 |" in text
    )  # .60, .62, .64 with a mean of .025 over subjects
    assert "E-DI +0.100 [+0.100, +0.100] (paper +0.028), holds" in text
    assert "CT +0.000 [+0.000, +0.000] (paper +0.014), not to be told from none" in text
    assert "against IP-Adapter-plus: E-CI -0.100 [-0.100, -0.100] (paper +0.022), does not hold" in text
    assert "| MFI encoder + CSCL + MACL | strength 0.6 | 0.605 ± 0.020 | 0.715 ± 0.000 | 0.050 ± 0.000 |" in text
    assert "visual (seed 0, 1, 2)" in text and "both (seed" not in text.split("Not complete yet")[1]


def test_curves_are_of_the_seeds_that_were_measured_all_along_them(planned: Experiment):
    for job in planned.jobs(["visual"]):
        record(job, 0.5 + 0.1 * job.seed, 0.65)
    found = claims.measured_runs(planned)
    assert "| 3 | 0.625 ± 0.100 |" in document.scores_table(planned, found, ["visual"], 10000, paper=False)
    curve = document.learning_table(planned, found, ["visual"]).splitlines()[-1]
    assert curve.split(" | ")[1:4] == ["0.525"] * 3, "not the mean of three seeds before the first's"
    points = document.points_table(planned, found, ["visual"]).splitlines()[2:]
    assert [line.split(" | ")[2] for line in points] == ["0.525", "0.485", "0.565"]
    for job in planned.jobs(["fusion"]):
        record(job, 0.5, 0.65)
    assert document.learning_table(planned, claims.measured_runs(planned), ["fusion"]) == "", "it has none"


def test_claims_are_ok_where_the_whole_interval_is(planned: Experiment):
    for job in planned.jobs(["both", "fusion", "cscl"]):
        better = {"both": 0.05, "fusion": 0.0, "cscl": (0.05, -0.03, 0.0)[job.seed]}[job.name]
        record(job, 0.5 + better, 0.65, pose=0.2 if job.seed else 0.5, auc=0.9 + better)
    found = by_name(planned)
    assert found["cscl_and_macl_e_di"].verdict == "ok" and found["cscl_and_macl_ct"].verdict == "short"
    assert found["cscl_e_di"].verdict == "short" and found["macl_e_di"].verdict == "missing"
    assert found["s_plus_views"].verdict == "ok"
    assert found["pose_not_copied"].found.value == pytest.approx((0.35 + 0.05 + 0.05) / 3)
    assert found["pose_not_copied"].verdict == "short"
    assert {line[3] for line in claims.lines(list(found.values()))} == {"ok", "short", "missing"}


def test_methods_are_compared_at_equal_control(planned: Experiment):
    # The same trade-off, .05 better, shown at a setting with more control and less similarity.
    for job in planned.jobs(["both", "ip-adapter-plus"]):
        record(job, *((0.55, 0.67) if job.name == "both" else (0.56, 0.61)))
    found = by_name(planned)["over_ip_adapter_plus"]
    assert found.found.value == pytest.approx(0.05) and found.verdict == "ok"
    assert by_name(planned)["over_self_reconstruction"].verdict == "missing"


def test_expectations_of_the_rivals_hold_where_the_interval_says_so(planned: Experiment):
    assert {one.verdict for one in rivals.expectations(planned)} == {"missing"}
    for job in planned.jobs(["realcustom", "realcustom-text", "realcustom-pp", "ip-adapter-plus"]):
        lead = {"realcustom": 0.05, "realcustom-pp": (0.1, -0.1, 0.0)[job.seed]}.get(job.name, 0.0)
        record(job, 0.5 + lead, 0.65, outside=0.1 - lead, rise=0.3 if job.name == "realcustom" else -0.1)
    found = rivals.expectations(planned)

    def verdicts(words: str) -> list[str]:
        return [one.verdict for one in found if words in one.says]

    assert verdicts("less change outside") == ["holds", "missing", "within the spread", "missing"]
    assert verdicts("closer to the finished") == ["holds", "does not hold"]
    assert verdicts("latent alone") == ["missing"]
    (better,) = [one for one in found if "text and latent" in one.says]
    assert better.verdict == "holds" and better.found.value == pytest.approx(0.05)
    assert verdicts("half of the steps") == ["holds", "holds"]  # nothing was expected, and nothing is seen
    page = document.page(planned, Experiment(read_matrix(SEARCH), planned.params, SEARCH.stem, "photos"))
    assert "| RealCustom: the mask comes closer to the finished subject over the steps | +0.300" in page
    assert "| RealCustom | own | 0.200 ± 0.000 | 0.200 ± 0.000 | 0.350 ± 0.000 |" in page


def test_search_is_shown_with_its_trials(planned: Experiment):
    search = Experiment(read_matrix(SEARCH), planned.params, SEARCH.stem, "photos")
    assert document.trials_table(search) == ""
    assert "`make ablation-search` makes it" in document.page(planned, search)
    record(search.jobs(["both-lr-0.001"])[0], 0.6, 0.65)
    assert "| CustomContrast | lr 0.001 | 0.625 | 0.675 | 0.800 | 0.900 | 0.850 |" in document.trials_table(search)
    assert "has not been run" not in document.page(planned, search)


def test_figure_shows_curves_of_the_seeds_that_were_measured_along_them(planned: Experiment, tmp_path: Path):
    for job in planned.jobs(["visual", "fusion"]):
        record(job, 0.5 + 0.1 * job.seed, 0.65)
    drawn = figure.curves(planned, claims.measured_runs(planned))
    mean = 0.025  # over subjects
    assert drawn["visual Q-Former"] == [
        pytest.approx(point)
        for point in ((0.61 + mean, 0.54 + mean), (0.65 + mean, 0.5 + mean), (0.69 + mean, 0.46 + mean))
    ], "the first seed's, from 1.4 to 0.6"
    assert drawn["+ TV fusion (MFI encoder)"] == [pytest.approx((0.65 + mean, 0.6 + mean))], "mean of three seeds"
    figure.write_figure(drawn, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert figure.numbers(drawn) in text and "visual Q-Former" in text and "TV fusion" in text
    figure.write_figure(drawn, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text, "the same bytes"


@pytest.mark.parametrize(
    ("change", "paper", "words"),
    [
        ((0.4, 0.3, 0.5), 0.1, "holds"),
        ((0.4, 0.3, 0.5), -0.1, "does not hold"),
        ((0.4, -0.1, 0.9), 0.1, "not to be told from none"),
        ((-0.4, -0.5, -0.3), None, "-0.400 [-0.500, -0.300]"),
    ],
)
def test_verdict_by_hand(change: tuple[float, float, float], paper: float | None, words: str):
    assert document.verdict(Estimate(*change, seeds=3), paper).endswith(words)


def test_page_in_the_repository_is_of_its_results():
    current = [experiment.experiment_of(file, Params.read()) for file in (FILE, SEARCH)]
    assert document.DOCUMENT.read_text(encoding="utf-8") == document.page(*current), "run make ablation"
    drawn = figure.curves(current[0], claims.measured_runs(current[0]))
    assert not drawn or figure.numbers(drawn) in document.FIGURE.read_text(encoding="utf-8"), "run make ablation"
