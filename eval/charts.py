"""Charts of the report as SVG text that takes its colours and fonts from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

# matplotlib wants colours, the page has variables for light and dark: these stand in, and are replaced in the SVG.
COLOURS = {
    "ink": "#010203",
    "line": "#040506",
    "customcontrast": "#070809",
    "real": "#0a0b0c",
    "copy": "#0d0e0f",
}
MAX_POINTS = 240
"""More than a chart of this width has pixels for."""


def bars_by_group(values: Mapping[str, Mapping[str, float | None]], line: float | None, name: str) -> str:
    """Return horizontal bars: group -> method -> score, and a dashed line at what real photos reach."""
    methods = [method for method in ("customcontrast", "copy") if any(method in row for row in values.values())]
    figure, axes = _figure(3.6, 0.5 + 0.42 * max(len(values), 1))
    height = 0.8 / max(len(methods), 1)
    for number, method in enumerate(methods):
        places = [row + (number - (len(methods) - 1) / 2) * height for row in range(len(values))]
        widths = [values[group].get(method) or 0.0 for group in values]
        axes.barh(places, widths, height * 0.92, color=COLOURS[method])
    if line is not None:
        axes.axvline(line, color=COLOURS["real"], linestyle=(0, (3, 2)), linewidth=1.4)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=COLOURS["line"], linewidth=0.6)
    return _svg(figure, name)


def curve(steps: Sequence[float], values: Sequence[float], name: str) -> str:
    """Return a curve: means of at most MAX_POINTS runs of steps, and the range of each as a band."""
    figure, axes = _figure(3.6, 1.9)
    runs = min(MAX_POINTS, max(1, len(steps) // 4), len(steps)) or 1
    cells = [
        (np.mean(x), np.mean(y), np.min(y), np.max(y))
        for x, y in zip(
            np.array_split(np.array(steps, float), runs), np.array_split(np.array(values, float), runs), strict=True
        )
        if len(x)
    ]
    x, mean, low, high = np.array(cells).T if cells else np.empty((4, 0))
    axes.fill_between(x, low, high, color=COLOURS["customcontrast"], alpha=0.18, linewidth=0)
    axes.plot(x, mean, color=COLOURS["customcontrast"], linewidth=1.4, marker="o" if len(x) < 3 else "", markersize=3)
    axes.grid(color=COLOURS["line"], linewidth=0.6)
    return _svg(figure, name)


def histogram(series: Mapping[str, np.ndarray], limits: tuple[float, float], bins: int, name: str) -> str:
    """Return overlaid histograms with one colour each (at most two)."""
    figure, axes = _figure(3.6, 1.9)
    for values, colour in zip(series.values(), (COLOURS["customcontrast"], COLOURS["copy"]), strict=False):
        axes.hist(values, bins=bins, range=limits, color=colour, alpha=0.55)
    axes.set_xlabel("degrees between viewing directions")
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    return _svg(figure, name)


def heat_map(values: np.ndarray, labels: Sequence[str], name: str) -> str:
    """Return a square of cosines with a label in the middle of each run of equal labels."""
    figure, axes = _figure(4.6, 4.2)
    shown = axes.imshow(values, cmap="viridis", interpolation="none", vmin=float(np.nanmin(values)), vmax=1.0)
    edges = [i for i in range(len(labels)) if i == 0 or labels[i] != labels[i - 1]] + [len(labels)]
    middles = [(low + high - 1) / 2 for low, high in pairwise(edges)]
    names = [labels[low] for low in edges[:-1]]
    axes.set_xticks(middles, names, rotation=90)
    axes.set_yticks(middles, names)
    axes.tick_params(length=0)
    bar = figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    return _svg(figure, name)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure of `width` x `height` inches and its axes, drawn without any window system."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "text.parse_math": False,  # class nouns are text, whatever signs they hold
        "font.size": 8,
        "text.color": COLOURS["ink"],
        "axes.labelcolor": COLOURS["ink"],
        "axes.edgecolor": COLOURS["line"],
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": COLOURS["line"],
        "ytick.color": COLOURS["line"],
        "xtick.labelcolor": COLOURS["ink"],
        "ytick.labelcolor": COLOURS["ink"],
        "figure.facecolor": "none",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def _svg(figure: Any, name: str) -> str:
    """Return the figure as an SVG element; ids start from `name`, so that charts of one page do not share them."""
    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "text.parse_math": False}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    # The SVG names of figure parts ("axes_1") repeat from chart to chart; nothing refers to them.
    return re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick|\w+Collection|legend)[^"]*"', "", text)
