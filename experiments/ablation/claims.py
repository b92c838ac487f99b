"""The paper's claims, checked on the results: `python -m experiments.ablation.claims` prints a line for each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.ablation.experiment import OWN, Experiment, experiment_of
from experiments.ablation.intervals import Estimate, Measured, Values, at_equal_control, difference, estimate, paired
from experiments.ablation.matrix import FILE
from experiments.ablation.measures import excess
from runtime.cli import Parser, guarded, read_params, shared_options
from runtime.text import text_table

SIMILARITY, CONTROL = "E-DI", "CT"
POSE_MARGIN = 0.1
"""How much more often than by chance an image may have its reference's pose: 5 of the 48 images in which it is read."""


@dataclass(frozen=True)
class Claim:
    """A claim and what was measured for it; None: not measured yet."""

    name: str
    says: str
    found: Estimate | None
    goal: str
    holds: Callable[[Estimate], bool]

    @property
    def verdict(self) -> str:
        """ok, short, or missing."""
        return "missing" if self.found is None else "ok" if self.holds(self.found) else "short"


def above(found: Estimate) -> bool:
    """Whether a number is above 0, its whole interval included."""
    return found.sign > 0


def measured_runs(experiment: Experiment) -> dict[str, Measured]:
    """Run -> its results by seed, in the order of the matrix; runs without results are left out."""
    results = experiment.results()
    of_each = {name: [result for result in results if result["run"] == name] for name in experiment.matrix.runs}
    return {name: Measured(sorted(found, key=lambda one: one["seed"])) for name, found in of_each.items() if found}


def claims(experiment: Experiment) -> list[Claim]:
    """All claims."""
    runs, samples = measured_runs(experiment), experiment.matrix.plan("both").samples

    def change(mine: str, theirs: str, column: str) -> Estimate | None:
        a, b = paired(runs.get(mine, Measured([])), runs.get(theirs, Measured([])), samples)
        return difference(a.values(column, samples), b.values(column, samples)) if a.results else None

    rows = [
        ("cscl_and_macl", "CSCL and MACL together", "both", "fusion", ("E-DI", "E-CI", "CT")),
        ("cscl", "CSCL alone", "cscl", "fusion", ("E-DI", "E-CI", "CT")),
        ("macl", "MACL alone", "macl", "fusion", ("E-DI", "E-CI", "CT")),
        ("textual", "the textual Q-Former", "textual", "visual", ("E-DI", "E-CI")),
        ("fusion", "TV fusion", "fusion", "textual", ("CT",)),
    ]
    found = [
        Claim(
            f"{name}_{column.lower().replace('-', '_')}",
            f"{words} raises {column}",
            change(mine, theirs, column),
            "> 0",
            above,
        )
        for name, words, mine, theirs, columns in rows
        for column in columns
    ]
    for other, words in (("ip-adapter-plus", "IP-Adapter-plus"), ("self-reconstruction", "self-reconstruction")):
        name = f"over_{other.replace('-', '_')}"
        says = f"more {SIMILARITY} than {words} at equal {CONTROL}"
        found.append(Claim(name, says, equal_control(experiment, runs, "both", other, samples), "> 0", above))
    says = "views of a subject are closer in S+ (AUC, same class) than with the MFI encoder alone"
    found.append(Claim("s_plus_views", says, views(runs, samples), "> 0", above))
    pose, goal = pose_excess(runs, samples), f"<= {POSE_MARGIN}"
    says = "pose of the reference, above chance"
    found.append(Claim("pose_not_copied", says, pose, goal, lambda of: of.value <= POSE_MARGIN))
    return found


def equal_control(
    experiment: Experiment, runs: Mapping[str, Measured], mine: str, theirs: str, samples: int
) -> Estimate | None:
    """`at_equal_control` of two runs over their operating points; None if a point is missing."""
    points = {name: [OWN, *experiment.matrix.curve(name)] for name in (mine, theirs)}
    found = {name: runs.get(name, Measured([])).at_points(samples, of_run) for name, of_run in points.items()}
    seeds = [seed for seed in found[mine].seeds if seed in found[theirs].seeds]
    if not seeds:
        return None

    def curve(name: str) -> list[tuple[Values, Values]]:
        of = found[name].only(seeds)
        return [(of.values(CONTROL, samples, at), of.values(SIMILARITY, samples, at)) for at in points[name]]

    return at_equal_control(curve(mine), curve(theirs))


def views(runs: Mapping[str, Measured], samples: int) -> Estimate | None:
    """S+ AUC among views of one class, of the whole method over the MFI encoder's, over seeds."""
    a, b = paired(runs.get("both", Measured([])), runs.get("fusion", Measured([])), samples)
    if not a.results:
        return None
    mine, theirs = (of.numbers(lambda one: one["views"]["s_plus"]["auc_same_class"], samples) for of in (a, b))
    return over_seeds(np.asarray(mine) - np.asarray(theirs))


def pose_excess(runs: Mapping[str, Measured], samples: int) -> Estimate | None:
    """How much more often than by chance images have the pose of their reference, over seeds."""
    found = runs.get("both", Measured([])).complete(samples)
    if not found.results:
        return None
    return over_seeds(np.asarray(found.numbers(excess, samples)))


def over_seeds(values: np.ndarray) -> Estimate:
    """Mean over seeds, with an interval over seeds alone."""
    return estimate(lambda seeds, _: float(values[seeds].mean()), len(values), 1)


def lines(found: Sequence[Claim]) -> Iterator[tuple[str, str, str, str]]:
    """name, value with interval, goal, verdict of each claim."""
    for claim in found:
        yield claim.name, "-" if claim.found is None else str(claim.found), claim.goal, claim.verdict


def main(words: Sequence[str]) -> None:
    parser = Parser(prog="python -m experiments.ablation.claims", description=__doc__)
    shared_options(parser)
    params = read_params(parser.parse_args(words))
    print(text_table(("claim", "value", "goal", ""), list(lines(claims(experiment_of(FILE, params))))))


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
