"""docs/ablation.svg: similarity against control of every run, along the operating points of those that have some."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from experiments.ablation.claims import CONTROL, SIMILARITY
from experiments.ablation.experiment import OWN, Experiment
from experiments.ablation.intervals import Measured
from runtime.digest import digest
from runtime.files import write_text

Point = tuple[float, float]
"""Control and similarity."""

INK, GREY, LINES = "#1f2328", "#8b949e", ("#0b6bcb", "#c4432b", "#2d8a4e", "#8250df", "#b08000")
STYLE: Any = {
    "font.size": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "ablation",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
}


def curves(experiment: Experiment, found: Mapping[str, Measured]) -> dict[str, list[Point]]:
    """Title of a run -> its operating points in order of control, means over the seeds measured at all of them."""
    drawn: dict[str, list[Point]] = {}
    for name, of in found.items():
        samples, points = experiment.matrix.plan(name).samples, experiment.matrix.curve(name)
        strengths = [point for point, change in points.items() if set(change) == {"strength"}]
        along = of.at_points(samples, [OWN, *strengths])
        if along.results:
            places = [
                tuple(float(np.nanmean(along.values(column, samples, point))) for column in (CONTROL, SIMILARITY))
                for point in (OWN, *strengths)
            ]
            drawn[experiment.matrix.runs[name].title] = sorted((x, y) for x, y in places)
    return drawn


def write_figure(drawn: Mapping[str, Sequence[Point]], file: Path) -> None:
    """Draw the curves as SVG; its description is `numbers`, by which a figure of other results is told."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        lines = iter(LINES)
        for title, points in drawn.items():
            x, y = zip(*points, strict=True)
            if len(points) > 1:
                axes.plot(x, y, "o-", color=next(lines, GREY), markersize=4.5, linewidth=1.5, label=title)
            else:
                axes.plot(x, y, "o", color=GREY, markersize=4)
                axes.annotate(title, (x[0], y[0]), xytext=(5, -3), textcoords="offset points", fontsize=7, color=GREY)
        axes.set_xlabel(f"{CONTROL}: the prompt is followed")
        axes.set_ylabel(f"{SIMILARITY}: the subject is kept")
        axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
        if any(len(points) > 1 for points in drawn.values()):
            axes.legend(frameon=False, loc="lower left")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Description": numbers(drawn)})
    write_text(file, "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")


def numbers(drawn: Mapping[str, Sequence[Point]]) -> str:
    """16 hex digits of the numbers in a figure."""
    return digest({title: [[round(value, 6) for value in point] for point in of] for title, of in drawn.items()})
