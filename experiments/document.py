"""Writes docs/ablation.md from the results of the runs: tables beside the paper's, and a verdict for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.matrix import Matrix, Run
from runtime.files import write_text

Result = dict[str, Any]
Read = Callable[[Result], float | None]

MODEL, WHOLE = "customcontrast", "both"
"""The method's name in the scores, and the run with all its parts."""

PAPER = ("E-CI", "E-DI", "CT")
"""The columns of the paper's Tables 3 and 4, in the order of `Run.paper`."""

VIEWS = "S+ AUC, same class"
"""Whether views of one subject cluster in S+, which the paper shows as a figure."""


def score(name: str) -> Read:
    """A column of the score stage."""
    return lambda result: (result["score"][MODEL][name] or {}).get("mean")


def view(name: str) -> Read:
    """A measure of S+ over the views of subjects; None without S+."""
    return lambda result: (result["views"].get("s_plus") or {}).get(name)


def truth(part: str, name: str) -> Read:
    """A column of the comparison with the toybox's ground truth."""
    return lambda result: result["truth"][part][name]


SCORES: dict[str, Read] = {name: score(name) for name in ("E-CI", "E-DI", "CT", "IR", "R-CI", "R-DI")} | {
    "S+ AUC": view("auc"),
    VIEWS: view("auc_same_class"),
    "location loss": lambda result: result["train"].get("location"),
}
TRUTH: dict[str, Read] = {
    **{name: truth("kept", name) for name in ("family", "colour", "pattern")},
    **{name: truth("followed", name) for name in ("scene", "style", "accessory", "shape")},
    "same pose": truth("pose", "same_pose"),
    "by chance": truth("pose", "chance"),
}

INTRODUCTION = """# The paper's ablation on the toybox

`make ablation` trains what is missing, and writes this page from `experiments/results`. {runs} runs of {steps} steps of
{batch} ({samples:,} samples) each, on the same triplets and with the same sampler; measured on {subjects} held-out
subjects, three per family, with {pictures} images per run. Numbers are means over seeds, ± the standard deviation over
seeds where there is more than one. Training and sampling ran on CPU cores; the results hold the minutes of each run.
Runs are compared seed by seed: the mean change ± its standard error. A change of less than twice its error is
*within the spread of seeds*; with three seeds, a change slightly above that is suggestive, not conclusive.

These are small backbones, a small world and short runs: what can be compared with the paper is the direction
of a change, not its size. Images are sampled with location masks, except for IP-Adapter-plus, which has none. A
location loss near 0 (perfect: -1) would mean that the maps do not localise the subject, and then masks suppress
the visual branch.
"""

EARLIER = """**These results are of an earlier training of the toybox's backbones**: they were trained on other tables,
or sampled and measured with other weights or settings ({then}), than they would be now ({now}).
Comparisons among them hold for those; `make ablation` runs all of them again.
"""

TRUTH_WORDS = """The toybox knows what it rendered, so a classifier ([its own accuracy](toybox.md)) can measure whether
an image shows the subject's family, colour and pattern, and what its prompt asked for. The pose of an image is that of
the nearest of 72 renders of the subject, for subjects whose own photos show it; *same pose* is the share of images
within 30 degrees of the photo that was shown, *by chance* the same images against all photos of their
subject: a method that copies the view of its reference is above it.
"""


def write_document(matrix: Matrix, results: Sequence[Result], data: str, file: Path) -> None:
    """Write the page of the results that exist; `data`: the present `ablation.Circumstances.name`."""
    found = by_run(matrix, results)
    if found:
        write_text(file, page(matrix, found, data))


def by_run(matrix: Matrix, results: Sequence[Result]) -> dict[str, list[Result]]:
    """Run -> its results by seed, in the order of the matrix; runs without results are left out."""
    of_each = {name: [result for result in results if result["run"] == name] for name in matrix.runs}
    return {name: sorted(members, key=lambda result: result["seed"]) for name, members in of_each.items() if members}


def page(matrix: Matrix, found: dict[str, list[Result]], data: str) -> str:
    """The page as Markdown; it notes if its results are of other circumstances than `data`."""
    every = [result for members in found.values() for result in members]
    steps = matrix.common["train"]["steps"]
    batch = round(every[0]["train"].get("batch", 16))
    parts = [
        INTRODUCTION.format(
            runs=len(every),
            steps=steps,
            batch=batch,
            samples=steps * batch,
            subjects=every[0]["views"]["subjects"],
            pictures=every[0]["score"][MODEL]["pictures"],
        )
    ]
    if every[0]["data"] != data:
        parts.append(EARLIER.format(then=every[0]["data"], now=data))
    rows = of_kind(matrix, found, "ablation")
    if rows:
        parts += ["## Tables 3 and 4\n", table(rows, SCORES, paper=True), views_words(every), directions(matrix, found)]
        parts += ["## Against the toybox's ground truth\n", TRUTH_WORDS, table(rows, TRUTH)]
    baselines = of_kind(matrix, found, "baseline")
    if baselines:
        whole = [(matrix.runs[WHOLE], found[WHOLE])] if WHOLE in found else []
        parts += ["## Baselines\n", table(baselines + whole, SCORES, paper=True)]
        if whole:
            parts.append(against_baselines(matrix, found))
        parts.append(table(baselines + whole, TRUTH))
    factors = of_kind(matrix, found, "factor")
    if factors:
        first = [(matrix.runs[WHOLE], found[WHOLE][:1])] if WHOLE in found else []
        parts += ["## Factors of MACL, one seed\n", table(first + factors, SCORES), table(first + factors, TRUTH)]
    absent = missing(matrix, found)
    if absent:
        parts.append(f"Not run yet: {', '.join(absent)}.\n")
    return "\n".join(parts)


def views_words(results: Sequence[Result]) -> str:
    """What the S+ columns are, and what the image encoder alone reaches."""
    encoder = results[0]["views"]["image_encoder"]
    return (
        "*S+ AUC*: how often two views of one subject are closer in S+ than views of two subjects, of\n"
        f"all or of one class. The image encoder's own tokens reach {encoder['auc']:.3f} and"
        f" {encoder['auc_same_class'] or float('nan'):.3f}.\n"
    )


def of_kind(matrix: Matrix, found: dict[str, list[Result]], kind: str) -> list[tuple[Run, list[Result]]]:
    """The runs of a kind that have results."""
    return [(run, found[name]) for name, run in matrix.runs.items() if run.kind == kind and name in found]


def missing(matrix: Matrix, found: dict[str, list[Result]]) -> list[str]:
    """Runs and seeds without a result."""
    done = {(result["run"], result["seed"]) for members in found.values() for result in members}
    absent = {
        name: [seed for seed in matrix.seeds[run.kind] if (name, seed) not in done] for name, run in matrix.runs.items()
    }
    return [f"{name} (seed {', '.join(map(str, seeds))})" for name, seeds in absent.items() if seeds]


def values_of(results: Sequence[Result], read: Read) -> list[float]:
    """The values of a column, one for each seed that has it."""
    return [value for value in map(read, results) if value is not None]


def cell(values: Sequence[float]) -> str:
    """Mean and, for several seeds, standard deviation."""
    if not values:
        return "-"
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean


def table(rows: Sequence[tuple[Run, list[Result]]], columns: dict[str, Read], paper: bool = False) -> str:
    """A Markdown table, one row per run; `paper` adds the paper's columns."""
    head = ["run", "seeds", *columns, *(f"paper's {name}" for name in PAPER if paper)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for run, results in rows:
        shown = [cell(values_of(results, read)) for read in columns.values()]
        theirs = [f"{value:.3f}" for value in run.paper] if run.paper else ["-"] * len(PAPER)
        lines.append("| " + " | ".join([run.title, str(len(results)), *shown, *(theirs if paper else [])]) + " |")
    return "\n".join(lines) + "\n"


def directions(matrix: Matrix, found: dict[str, list[Result]]) -> str:
    """A line for each row: whether the paper's direction holds here."""
    pairs = [(name, run.against) for name, run in matrix.runs.items() if run.against in found and name in found]
    return "\n".join(comparison(matrix, found, name, against) for name, against in pairs if against) + "\n"


def against_baselines(matrix: Matrix, found: dict[str, list[Result]]) -> str:
    """A line for each baseline: the whole method against it."""
    names = [name for name, run in matrix.runs.items() if run.kind == "baseline" and name in found]
    return "\n".join(comparison(matrix, found, WHOLE, name) for name in names) + "\n"


def comparison(matrix: Matrix, found: dict[str, list[Result]], name: str, against: str) -> str:
    """One run against another: the change of the paper's columns, with a verdict each, and of the views."""
    run, other = matrix.runs[name], matrix.runs[against]
    before = {result["seed"]: result for result in found[against]}
    both = [(result, before[result["seed"]]) for result in found[name] if result["seed"] in before]

    def changes(read: Read) -> list[float]:
        values = [(read(mine), read(theirs)) for mine, theirs in both]
        return [mine - theirs for mine, theirs in values if mine is not None and theirs is not None]

    words = []
    for place, column in enumerate(PAPER):
        theirs = run.paper[place] - other.paper[place] if run.paper and other.paper else None
        words.append(f"{column} {verdict(theirs, changes(SCORES[column]))}")
    of_views = changes(SCORES[VIEWS])
    if of_views:
        shown = "" if other.paper is None else " (the paper shows it in its Fig. 7)"
        words.append(f"{VIEWS} {np.mean(of_views):+.3f}{shown}")
    return f"- **{run.title}**, against {other.title}: {'; '.join(words)}."


def verdict(theirs: float | None, changes: Sequence[float]) -> str:
    """How the mean of a column's `changes`, one per seed of both runs, compares with the paper's change, if it has one.

    Runs of one seed share noise and the order of samples, so an effect of the seed on all of them cancels. A change
    below twice its standard error over the seeds is not significant; with one seed the error is unknown.
    """
    if not changes:
        return "has no seed in common"
    change = float(np.mean(changes))
    error = float(np.std(changes, ddof=1) / np.sqrt(len(changes))) if len(changes) > 1 else None
    said = f"{change:+.3f}" if error is None else f"{change:+.3f} ± {error:.3f}"
    said = said if theirs is None else f"{said} (paper {theirs:+.3f})"
    as_in_paper = theirs is not None and change * theirs > 0
    if error is None:
        if theirs is None:
            return f"{said}, one seed"
        return f"{said}, {'the same direction' if as_in_paper else 'another direction'} with one seed"
    if abs(change) <= 2 * error:
        return f"{said}, within the spread of seeds"
    if theirs is None:
        return f"{said}, beyond the spread of seeds"
    return f"{said}, {'holds' if as_in_paper else 'does not hold'}"
