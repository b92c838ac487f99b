"""What is expected of RealCustom and RealCustom++, checked on the results of the ablation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from experiments.ablation.claims import CONTROL, SIMILARITY, measured_runs, over_seeds
from experiments.ablation.experiment import OWN, Experiment
from experiments.ablation.intervals import Estimate, Measured, difference
from experiments.ablation.measures import Read, excess, outside, overlap_at, overlap_rise

RC, PP, IP, CC = "realcustom", "realcustom-pp", "ip-adapter-plus", "both"


@dataclass(frozen=True)
class Expectation:
    """An expected difference and what was measured; None: not measured yet."""

    says: str
    sign: int
    """1: above 0; -1: below; 0: none that can be told."""
    found: Estimate | None

    @property
    def verdict(self) -> str:
        """In words, for a table."""
        if self.found is None:
            return "missing"
        if self.found.sign == self.sign:
            return "holds"
        return "does not hold" if self.found.sign else "within the spread"


def expectations(experiment: Experiment) -> list[Expectation]:
    """All of them."""
    runs, samples = measured_runs(experiment), experiment.matrix.plan(RC).samples
    last = experiment.matrix.common["generate"]["steps"] - 1

    def pair(mine: str, theirs: str) -> tuple[Measured, Measured, str, str]:
        """The results of two `run` or `run@point` of the seeds that both have, and their points."""
        (a, _, at), (b, _, other) = mine.partition("@"), theirs.partition("@")
        at, other = at or OWN, other or OWN
        found = [runs.get(name, Measured([])).complete(samples, point) for name, point in ((a, at), (b, other))]
        return found[0].only(found[1].seeds), found[1].only(found[0].seeds), at, other

    def column(name: str) -> Callable[[str, str], Estimate | None]:
        """The difference in a column of the published table, over seeds and subjects."""

        def change(mine: str, theirs: str) -> Estimate | None:
            a, b, at, other = pair(mine, theirs)
            return difference(a.values(name, samples, at), b.values(name, samples, other)) if a.results else None

        return change

    def number(read: Read) -> Callable[[str, str], Estimate | None]:
        """The difference in a number of each measurement, over seeds."""

        def change(mine: str, theirs: str) -> Estimate | None:
            a, b, at, other = pair(mine, theirs)
            x, y = a.numbers(read, samples, at), b.numbers(read, samples, other)
            return over_seeds(np.subtract(x, y)) if x and len(x) == len(y) else None

        return change

    def rise(name: str) -> Estimate | None:
        found = runs.get(name, Measured([])).complete(samples).numbers(overlap_rise, samples)
        return over_seeds(np.asarray(found)) if found else None

    similarity, control, change = column(SIMILARITY), column(CONTROL), number(outside)
    rows = [
        (
            f"RealCustom: a scope of .4 has more {SIMILARITY} than one of .1",
            1,
            similarity(f"{RC}@scope-0.4", f"{RC}@scope-0.1"),
        ),
        (
            f"RealCustom: a scope of .4 has less {CONTROL} than one of .1",
            -1,
            control(f"{RC}@scope-0.4", f"{RC}@scope-0.1"),
        ),
        (f"RealCustom: a binary mask has less {CONTROL} than a soft one", -1, control(f"{RC}@binary", RC)),
        (f"RealCustom: the mask costs {SIMILARITY}", -1, similarity(RC, f"{RC}@whole")),
        (
            f"RealCustom: scores by text and latent have more {SIMILARITY} than by the text alone",
            1,
            similarity(RC, "realcustom-text"),
        ),
        (
            f"RealCustom: scores by the text alone have more {SIMILARITY} than none",
            1,
            similarity("realcustom-text", "realcustom-none"),
        ),
        (
            f"RealCustom: scores by the latent alone have less {SIMILARITY} than none",
            -1,
            similarity("realcustom-visual", "realcustom-none"),
        ),
        (
            f"RealCustom: a mean of both scores has less {SIMILARITY} than the schedule",
            -1,
            similarity("realcustom-mean", RC),
        ),
        *(
            (f"{name}: less change outside the subject than {than}", -1, change(run, other))
            for name, run in (("RealCustom", RC), ("RealCustom++", PP))
            for than, other in (("IP-Adapter-plus", IP), ("CustomContrast", CC))
        ),
        *(
            (f"{name}: more {CONTROL} than IP-Adapter-plus", 1, control(run, IP))
            for name, run in (("RealCustom", RC), ("RealCustom++", PP))
        ),
        *(
            (f"{name}: the mask comes closer to the finished subject over the steps", 1, rise(run))
            for name, run in (("RealCustom", RC), ("RealCustom++", PP))
        ),
        (
            "RealCustom: the last mask is closer with self-attention",
            1,
            number(overlap_at(last))(f"{RC}@self-attention", RC),
        ),
        (f"RealCustom++: masks after half of the steps change no {SIMILARITY}", 0, similarity(f"{PP}@steps-1", PP)),
        (f"RealCustom++: masks after half of the steps change no {CONTROL}", 0, control(f"{PP}@steps-1", PP)),
        (
            "RealCustom++: the curriculum has the reference's pose less often",
            -1,
            number(excess)(PP, "realcustom-pp-constant"),
        ),
        (f"RealCustom++: the high view brings no {SIMILARITY} at 64 pixels", 0, similarity(PP, "realcustom-pp-low")),
    ]
    return [Expectation(says, sign, found) for says, sign, found in rows]
