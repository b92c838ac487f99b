"""Writes docs/ablation.md from the results of the runs: tables beside the paper's, and a verdict for each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ablation.claims import CONTROL, SIMILARITY, claims, measured_runs
from experiments.ablation.experiment import OWN, Experiment, experiment_of
from experiments.ablation.figure import curves, write_figure
from experiments.ablation.intervals import LEVEL, RESAMPLES, Measured, difference, paired, require
from experiments.ablation.matrix import FILE, SEARCH, Kind
from experiments.ablation.measures import Read, excess, followed, kept, outside, overlap_at, truth, views
from experiments.ablation.rivals import Expectation, expectations
from runtime.files import write_text
from runtime.params import Params
from runtime.text import unwrapped

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "ablation.md"
FIGURE = DOCUMENT.with_suffix(".svg")
FINDINGS = Path(__file__).with_name("findings.md")
"""What the results say, written by hand; it is part of the page."""

WHOLE = "both"
"""The run with all parts of the method."""
PAPER = ("E-CI", "E-DI", "CT")
"""The columns of the paper's Tables 3 and 4, in the order of `Run.paper`."""
COLUMNS = (*PAPER, "IR", "R-CI", "R-DI")
DETECTABLE = {"E-CI": 0.019, "E-DI": 0.010, "CT": 0.004}
"""The smallest difference that three seeds can tell from none in four of five cases, stated before the runs: 2.8 times
the standard error of seven paired differences, pooled, of 28 earlier runs of 10,240 samples."""

PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the sampler's steps after which location masks are shown."""

LAST: dict[str, Read] = {
    "S+ AUC": views("auc"),
    "S+ AUC, same class": views("auc_same_class"),
    "location loss": lambda one: one["train"].get("location") or None,
}
"""Read only where runs are compared."""


TRUTH: dict[str, Read] = {
    **{name: truth("kept", name) for name in ("family", "colour", "pattern")},
    **{name: truth("followed", name) for name in ("scene", "style", "accessory", "shape")},
    "same pose - chance": excess,
    "change outside": outside,
}


INTRODUCTION = """# The paper's ablation on the toybox

`make ablation` makes what is missing and writes this page from `experiments/results`; `make ablation-check` prints the
claims. {runs} of {planned} runs are complete. Each is one training with a constant learning rate and an average of the
weights, measured after {samples} samples of batch {batch}: on the same triplets, with the same sampler, on
{subjects} held-out subjects, three per family, with {pictures} images each. Learning curves are of the first seed, and
so are the operating points of runs that are not compared along them.

Numbers are means over seeds, ± the standard deviation over seeds where there is more than one. A difference is paired
by seed and subject; in brackets is its {level:.0%} interval from {resamples:,} bootstrap samples that draw seeds and
subjects together. Three seeds can tell {detectable} from none in four of five cases; that was stated before the runs,
from the spread of earlier ones. The page makes {comparisons} comparisons with a verdict; without any effect, one in
twenty would still seem to have one.

These are small backbones, a small world and short runs: what can be compared with the paper is the direction of a
change, not its size. The location loss has the paper's weight, and after so few samples no map of it is a mask: images
are sampled without location masks, except those of RealCustom and RealCustom++. The reading *location* trains maps that
are, with a hundred times the weight.
"""

FIGURE_WORDS = """A line is one adapter over the strength of the visual branch, .6, 1 and 1.4: more of the subject is
less of the prompt. A point is a run at its own setting. What lies above and to the right is better.
"""

TRUTH_WORDS = """The toybox knows what it rendered, so a classifier ([its own accuracy](toybox.md)) can measure whether
an image shows the subject's family, colour and pattern, and what its prompt asked for. The pose of an image is that of
the nearest of 72 renders of the subject, for subjects whose own photos show it; *same pose - chance* is the share of
images within 30 degrees of the photo that was shown, less that of the same images against all photos of their subject.
*Change outside* is the mean absolute difference (0 to 1) from the image of the prompt alone, from the same noise, where
neither shows the subject.
"""

POINT_WORDS = """E-DI and CT of one adapter over the strength of the visual branch, with and without location masks.
Methods are compared where both have the same CT, the mean of their own settings': at one arbitrary point each, more
similarity may only be less control.
"""

OVERLAP_WORDS = """How much the location mask of a step lies on the finished subject, from 0 to 1: the sum of the
cells' minima over that of their maxima, where the other mask is the judge's of the finished image. CustomContrast uses
a step's mask in the next step, RealCustom and RealCustom++ in the same one.
"""

EXPECTED_WORDS = """What the papers of RealCustom and RealCustom++ say, or what follows from their design, and what was
measured: it *holds* or *does not hold* where the interval excludes 0, and is *within the spread* where it does not.
Where no difference is expected, it *holds* while none can be told.
"""

SEARCH_WORDS = """The same small search for every method, five trials each of {samples:,} samples on {subjects} held-out
subjects that are in no other table (`make ablation-search`). *kept* is the mean of the judge's family, colour and
pattern, *followed* that of scene, style, accessory and shape; the best mean of both is used above, by all rows of a
method.
"""

UNSEARCHED_WORDS = """The learning rate is the best of a small search, the same for every method, that was made under a
hundred times the weight of the location loss. `make ablation-search` makes it under this one, and has not been run.
"""


def write_document(params: Params) -> Path:
    """Write the page of the results that count under `params`, and its figure; return the place of the page."""
    ablation = experiment_of(FILE, params)
    write_text(DOCUMENT, page(ablation, experiment_of(SEARCH, params)))
    if drawn := curves(ablation, measured_runs(ablation)):
        write_figure(drawn, FIGURE)
    return DOCUMENT.relative_to(ROOT)


def page(ablation: Experiment, search: Experiment) -> str:
    """The page as Markdown."""
    found = measured_runs(ablation)
    parts = [introduction(ablation, found)]
    if FINDINGS.is_file():
        parts.append(FINDINGS.read_text(encoding="utf-8"))
    parts += ["## The paper's claims\n", claims_table(ablation)]
    if found:
        parts += [f"![{SIMILARITY} against {CONTROL}]({FIGURE.name})\n", FIGURE_WORDS]
    parts += section(ablation, found, "Tables 3 and 4", "ablation", paper=True)
    parts += section(ablation, found, "Baselines", "baseline", paper=True)
    rivals = section(ablation, found, "RealCustom and RealCustom++", "rival")
    parts += [*rivals, *([EXPECTED_WORDS, expected_table(expectations(ablation))] if rivals else [])]
    parts += section(ablation, found, "Other readings of the paper", "reading")
    parts += section(ablation, found, "Factors of MACL", "factor")
    parts += ["## Hyperparameters\n", trials_table(search) or UNSEARCHED_WORDS]
    absent = missing(ablation)
    if absent:
        parts.append(f"Not complete yet: {', '.join(absent)}.\n")
    return unwrapped("\n".join(parts))


def introduction(ablation: Experiment, found: dict[str, Measured]) -> str:
    """How it was measured, and how much there is."""
    jobs = ablation.jobs()
    some = next((result["measured"][0] for of in found.values() for result in of.results), None)
    scored = some["scores"]["E-DI"] if some else {}
    protocol = ablation.matrix.common["generate"]["protocol"]
    each = protocol["prompts"] * protocol["images"] + protocol["reconstructions"]
    return INTRODUCTION.format(
        runs=sum(not job.missing() for job in jobs),
        planned=len(jobs),
        samples=f"{ablation.matrix.plan(WHOLE).samples:,}",
        batch=ablation.matrix.common["train"]["batch"],
        subjects=len(scored) or ablation.matrix.world["toybox"]["dreambench_subjects"],
        pictures=each,
        level=LEVEL,
        resamples=RESAMPLES,
        detectable=words([f"{value:.3f} of {name}" for name, value in DETECTABLE.items()]),
        comparisons=len(claims(ablation))
        + len(expectations(ablation))
        + sum(len(PAPER) for run in ablation.matrix.runs.values() if run.against),
    )


def words(items: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def claims_table(ablation: Experiment) -> str:
    """A row for each claim."""
    rows = [
        (claim.says, "-" if claim.found is None else str(claim.found), claim.goal, claim.verdict)
        for claim in claims(ablation)
    ]
    return markdown(("claim", "difference", "goal", ""), rows)


def section(
    ablation: Experiment, found: dict[str, Measured], title: str, kind: Kind, *, paper: bool = False
) -> list[str]:
    """The runs of a kind: scores, verdicts, the toybox's ground truth and learning curves; [] without results."""
    matrix = ablation.matrix
    names = [name for name, run in matrix.runs.items() if run.kind == kind]
    others = {matrix.runs[name].against or WHOLE for name in names} - set(names)
    shown = [name for name in (*names, *sorted(others)) if name in found]
    if not set(names) & set(shown):
        return []
    samples = matrix.plan(names[0]).samples
    parts = [
        f"## {title}\n",
        f"After {samples:,} samples.\n",
        scores_table(ablation, found, shown, samples, paper),
    ]
    compared = [comparison(ablation, found, name, samples) for name in names if name in found]
    parts.append("\n".join(line for line in compared if line) + "\n")
    if kind == "ablation":
        parts.append(TRUTH_WORDS)
    parts.append(truth_table(ablation, found, shown, samples))
    learned = learning_table(ablation, found, shown)
    if learned:
        parts += [f"{title}: learning curves.\n", learned]
    points = points_table(ablation, found, shown)
    if points:
        parts += [f"{title}: operating points.\n", *([POINT_WORDS] if kind == "baseline" else []), points]
    masks = overlap_table(ablation, found, [name for name in names if name in found])
    if masks:
        parts += [f"{title}: location masks.\n", *([OVERLAP_WORDS] if kind == "ablation" else []), masks]
    return parts


def scores_table(
    ablation: Experiment, found: dict[str, Measured], names: Sequence[str], samples: int, paper: bool
) -> str:
    """The columns of the published table, S+ and the location loss; `paper` adds the paper's."""
    head = ["run", "seeds", *COLUMNS, *LAST, *(f"paper's {name}" for name in PAPER if paper)]
    rows = []
    for name in names:
        run, of = ablation.matrix.runs[name], found[name].complete(samples)
        if not of.results:
            continue
        scores = [cell(np.nanmean(of.values(column, samples), axis=1)) for column in COLUMNS]
        last = [cell(of.numbers(read, samples)) if has_views(of, samples) else "-" for read in LAST.values()]
        theirs = [f"{value:.3f}" for value in run.paper] if run.paper else ["-"] * len(PAPER)
        rows.append([run.title, str(len(of.results)), *scores, *last, *(theirs if paper else [])])
    return markdown(head, rows)


def has_views(of: Measured, samples: int) -> bool:
    """Whether the runs' S+ was probed after so many samples."""
    return all("views" in require(result, samples, OWN) for result in of.results)


def truth_table(ablation: Experiment, found: dict[str, Measured], names: Sequence[str], samples: int) -> str:
    """The judge's columns."""
    of_each = {name: found[name].complete(samples) for name in names}
    rows = [
        [ablation.matrix.runs[name].title, *(cell(of.numbers(read, samples)) for read in TRUTH.values())]
        for name, of in of_each.items()
        if of.results
    ]
    return markdown(["run", *TRUTH], rows)


def learning_table(ablation: Experiment, found: dict[str, Measured], names: Sequence[str]) -> str:
    """E-DI, CT and what the judge sees along each learning curve; empty if none was measured."""
    of_each = {name: found[name].along(ablation.matrix.counts(name)) for name in names}
    of_each = {name: of for name, of in of_each.items() if of.results and len(ablation.matrix.counts(name)) > 1}
    counts = sorted({count for name in of_each for count in ablation.matrix.counts(name)})
    rows = []
    for name, along in of_each.items():
        several = [(along.complete(count), count) for count in counts]
        row = [ablation.matrix.runs[name].title]
        for column in ("E-DI", "CT"):
            row += [cell(np.nanmean(of.values(column, n), axis=1)) if of.results else "-" for of, n in several]
        row += [cell(of.numbers(kept, n)) if of.results else "-" for of, n in several]
        rows.append(row)
    short = [f"{count // 1000}k" for count in counts]
    head = ["run", *(f"{name} {count}" for name in ("E-DI", "CT", "kept") for count in short)]
    return markdown(head, rows) if rows else ""


def points_table(ablation: Experiment, found: dict[str, Measured], names: Sequence[str]) -> str:
    """E-DI, CT and the change outside at each operating point of each run; empty if none was measured."""
    rows = []
    for name in names:
        samples, points = ablation.matrix.plan(name).samples, ablation.matrix.curve(name)
        of = found[name].at_points(samples, list(points))
        for point in (OWN, *points):
            if of.results and points:
                scores = [cell(np.nanmean(of.values(column, samples, point), axis=1)) for column in ("E-DI", "CT")]
                change = cell(of.numbers(outside, samples, point))
                rows.append([ablation.matrix.runs[name].title, point.replace("-", " "), *scores, change])
    return markdown(["run", "point", "E-DI", "CT", "change outside"], rows) if rows else ""


def overlap_table(ablation: Experiment, found: dict[str, Measured], names: Sequence[str]) -> str:
    """The overlap of masks and finished subject over the steps, of each run and point that has masks; else empty."""
    steps = ablation.matrix.common["generate"]["steps"]
    rows = []
    for name in names:
        samples, points = ablation.matrix.plan(name).samples, ablation.matrix.curve(name)
        of = found[name].at_points(samples, list(points))
        for point in (OWN, *points):
            cells = [cell(of.numbers(overlap_at(part * (steps - 1)), samples, point)) for part in PARTS]
            if set(cells) != {"-"}:
                rows.append([ablation.matrix.runs[name].title, point.replace("-", " "), *cells])
    return markdown(["run", "point", *(f"{part:.0%}" for part in PARTS)], rows) if rows else ""


def expected_table(found: Sequence[Expectation]) -> str:
    """A row for each expectation of the rivals."""
    rows = [(one.says, "-" if one.found is None else str(one.found), one.verdict) for one in found]
    return markdown(("what their papers say", "difference", ""), rows)


def trials_table(search: Experiment) -> str:
    """The trials of the search with their scores; empty if there are none."""
    found = measured_runs(search)
    if not found:
        return ""
    samples = search.matrix.plan(next(iter(found))).samples
    rows = []
    for name, of in found.items():
        measured = require(of.results[0], samples, OWN)
        scores = [float(np.nanmean(of.values(column, samples))) for column in ("E-DI", "CT")]
        judged = [kept(measured), followed(measured)]
        values = [*scores, *judged, float(np.mean(judged))]
        rows.append([search.matrix.runs[name].title, changed(search, name), *(f"{value:.3f}" for value in values)])
    told = SEARCH_WORDS.format(samples=samples, subjects=search.matrix.world["toybox"]["dreambench_subjects"])
    return told + "\n" + markdown(("method", "trial", "E-DI", "CT", "kept", "followed", "mean of both"), rows)


def changed(search: Experiment, name: str) -> str:
    """What distinguishes a trial: the last two words of its name, such as `lr 0.001`."""
    method, _, value = name.rpartition("-")
    return f"{method.rpartition('-')[2]} {value}"


def cell(values: Sequence[float] | np.ndarray) -> str:
    """Mean and, for several seeds, standard deviation."""
    if not len(values):
        return "-"
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def comparison(ablation: Experiment, found: dict[str, Measured], name: str, samples: int) -> str:
    """One run against the one it is compared with, or the whole method against it: a verdict for each column."""
    matrix = ablation.matrix
    mine, theirs = (name, matrix.runs[name].against) if matrix.runs[name].against else (WHOLE, name)
    if not theirs or theirs not in found or mine not in found:
        return ""
    a, b = paired(found[mine], found[theirs], samples)
    if not a.results:
        return ""
    run, other = matrix.runs[mine], matrix.runs[theirs]
    said = []
    for place, column in enumerate(PAPER):
        change = difference(a.values(column, samples), b.values(column, samples))
        paper = run.paper[place] - other.paper[place] if run.paper and other.paper else None
        said.append(f"{column} {verdict(change, paper)}")
    return f"- **{run.title}**, against {other.title}: {'; '.join(said)}."


def verdict(change: Any, paper: float | None) -> str:
    """A difference in words; `paper`: the paper's."""
    said = str(change) if paper is None else f"{change} (paper {paper:+.3f})"
    if not change.sign:
        return f"{said}, not to be told from none"
    if paper is None:
        return said
    return f"{said}, {'holds' if change.sign * paper > 0 else 'does not hold'}"


def missing(ablation: Experiment) -> list[str]:
    """Runs and the seeds that are not complete."""
    absent: dict[str, list[int]] = {}
    for job in ablation.jobs():
        if job.missing():
            absent.setdefault(job.name, []).append(job.seed)
    return [f"{name} (seed {', '.join(map(str, seeds))})" for name, seeds in absent.items()]
