"""Charts of the report as SVG text that inherits colours and fonts from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np

P = ParamSpec("P")

# Placeholder colours for matplotlib, replaced in the SVG by the page's CSS variables for light and dark.
OTHERS = 4
COLOURS = {
    "ink": "#010203",
    "line": "#040506",
    "customcontrast": "#070809",
    "real": "#0a0b0c",
    "copy": "#0d0e0f",
    "prompt_only": "#101112",
    "truth": "#161718",
    **{f"other{number}": f"#1{number}1415" for number in range(OTHERS)},
}
LABEL = 18  # characters
MARKS = "os^Dvp*X"
"""Marker shapes of a subject's views, in turn."""
MAX_POINTS = 240
"""As many as a chart of this width can resolve."""


STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # class nouns are plain text, whatever characters they contain
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


def chart(draw: Callable[P, str]) -> Callable[P, str]:
    """Run all of `draw` under STYLE: matplotlib reads it when a text is created, not when it is rendered."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> str:
        import matplotlib as mpl

        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@dataclass(frozen=True)
class Point:
    """A method in a scatter: its name, colour, and estimates (mean, low, high) on both axes."""

    name: str
    colour: str
    x: Mapping[str, float | None]
    y: Mapping[str, float | None]
    main: bool


def colour(name: str) -> str:
    """Return a CSS variable of the page."""
    return f"var(--{name})"


def method_colours(methods: Iterable[str]) -> dict[str, str]:
    """Return the CSS variable of each method: the model and the oracles have their own, others rotate."""
    others = [name for name in methods if name not in COLOURS]
    turns = {name: f"other{number % OTHERS}" for number, name in enumerate(others)}
    return {name: colour(turns.get(name, name)) for name in methods}


@chart
def scatter(points: Sequence[Point], axes_names: tuple[str, str], line: tuple[str, float] | None, name: str) -> str:
    """Return labelled points with error bars, and a dashed line (name, y) at real photos."""
    figure, axes = _figure(4.4, 3.6)
    for point in points:
        drawn = _stand_in(point.colour)
        x, y = (float(of["mean"] or 0.0) for of in (point.x, point.y))
        for of, at in ((point.x, "x"), (point.y, "y")):
            if of["low"] is not None and of["high"] is not None:
                ends = (of["low"], of["high"])
                across = (ends, (y, y)) if at == "x" else ((x, x), ends)
                axes.plot(*across, color=drawn, linewidth=1.2, alpha=0.55, solid_capstyle="butt")
        axes.plot([x], [y], "o", color=drawn, markersize=7.5 if point.main else 5)
    if line is not None:
        axes.axhline(line[1], color=COLOURS["real"], linestyle=(0, (3, 2)), linewidth=1.2)
    axes.margins(0.16, 0.1)
    axes.set_xlabel(axes_names[0])
    axes.set_ylabel(axes_names[1])
    axes.grid(color=COLOURS["line"], linewidth=0.6)
    figure.draw_without_rendering()
    if line is not None:
        axes.annotate(
            line[0], (1, line[1]), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points",
            ha="right", color=COLOURS["real"], fontsize=7.5,
        )  # fmt: skip
    _name_points(axes, points, None if line is None else line[1])
    return _svg(figure, name)


def _name_points(axes: Any, points: Sequence[Point], line: float | None) -> None:
    """Place each point's name where it overlaps points, error bars, the line and earlier names least."""
    scale = axes.figure.dpi / 72  # pixels per point
    area = axes.get_window_extent()
    place = axes.transData.transform
    places = {point.name: place((float(point.x["mean"] or 0), float(point.y["mean"] or 0))) for point in points}
    taken = [(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in places.values()]
    for point in points:
        x, y = places[point.name]
        if point.x["low"] is not None and point.x["high"] is not None:
            taken.append((place((point.x["low"], 0))[0], y - scale, place((point.x["high"], 0))[0], y + scale))
        if point.y["low"] is not None and point.y["high"] is not None:
            taken.append((x - scale, place((0, point.y["low"]))[1], x + scale, place((0, point.y["high"]))[1]))
    if line is not None:
        across = place((0, line))[1]
        taken.append((area.x0, across - scale, area.x1, across + scale))
    for point in sorted(points, key=lambda of: not of.main):
        x, y = places[point.name]
        width, height = 4.3 * len(point.name) * scale, 9 * scale
        sides = []
        for dx, dy, align, left in (
            (7, -3, "left", 0.0),
            (-7, -3, "right", -1.0),
            (0, 7, "center", -0.5),
            (0, -13, "center", -0.5),
            (4, 5, "left", 0.0),
            (4, -12, "left", 0.0),
            (-4, 5, "right", -1.0),
            (-4, -12, "right", -1.0),
        ):
            x0, y0 = x + dx * scale + left * width, y + dy * scale
            box = (x0, y0, x0 + width, y0 + height)
            outside = max(area.x0 - x0, 0) + max(x0 + width - area.x1, 0)
            sides.append((sum(_overlap(box, other) for other in taken) + outside * height, dx, dy, align, box))
        _, dx, dy, align, box = min(sides, key=lambda side: side[0])
        taken.append(box)
        axes.annotate(
            point.name, (point.x["mean"], point.y["mean"]), xytext=(dx, dy), textcoords="offset points", ha=align,
            fontsize=7.5, fontweight="bold" if point.main else "normal", color=COLOURS["ink"],
        )  # fmt: skip


def short(label: str) -> str:
    """Return a label truncated to LABEL characters."""
    return label if len(label) <= LABEL else f"{label[: LABEL - 1]}…"


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


@chart
def dots_by_group(
    rows: Mapping[str, Mapping[str, Mapping[str, float | None] | None]],
    colours: Mapping[str, str],
    line: float | None,
    name: str,
) -> str:
    """Return group -> method -> estimate as dots with intervals, and a dashed line at the score of real photos."""
    methods = [method for method in colours if any(row.get(method) for row in rows.values())]
    step = min(0.7 / max(len(methods), 1), 0.22)
    figure, axes = _figure(3.6, 0.55 + len(rows) * (0.16 + 0.13 * max(len(methods), 1)))
    for place, row in enumerate(rows.values()):
        for number, method in enumerate(methods):
            found = row.get(method)
            if not found:
                continue
            y, drawn = place + (number - (len(methods) - 1) / 2) * step, _stand_in(colours[method])
            if found["low"] is not None:
                axes.plot((found["low"], found["high"]), (y, y), color=drawn, linewidth=2.2, alpha=0.45)
            axes.plot([found["mean"]], [y], "o", color=drawn, markersize=4.5)
    if line is not None:
        axes.axvline(line, color=COLOURS["real"], linestyle=(0, (3, 2)), linewidth=1.4)
    axes.set_yticks(range(len(rows)), [short(label) for label in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=COLOURS["line"], linewidth=0.6)
    for place in range(1, len(rows)):
        axes.axhline(place - 0.5, color=COLOURS["line"], linewidth=0.6)
    return _svg(figure, name)


@chart
def flat_map(places: np.ndarray, labels: Sequence[str], marks: Sequence[int], named: bool, name: str) -> str:
    """Return a map [P, 2]: one colour per label, points joined to the label's centroid, one shape per mark.

    named: whether to write each label at its points.
    """
    figure, axes = _figure(3.2, 3.2)
    labels_in_order = list(dict.fromkeys(labels))
    for number, label in enumerate(labels_in_order):
        own = np.flatnonzero(np.asarray(labels) == label)
        drawn = hls_to_rgb(number / len(labels_in_order), 0.56, 0.62)
        middle = places[own].mean(axis=0)
        for place in places[own]:
            axes.plot(*zip(middle, place, strict=True), color=drawn, linewidth=0.8, alpha=0.5)
        for point in own.tolist():
            axes.plot(*places[point], MARKS[marks[point] % len(MARKS)], color=drawn, markersize=5, alpha=0.95)
        if named:
            top = places[own][:, 1].max()
            axes.annotate(
                label, (middle[0], top), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7.5,
                color=COLOURS["ink"],
            )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.12)
    axes.set_aspect("equal", adjustable="datalim")
    return _svg(figure, name)


def _stand_in(variable: str) -> str:
    """Return the placeholder colour of a CSS variable of the page."""
    return COLOURS[variable.removeprefix("var(--").removesuffix(")")]


@chart
def curve(steps: Sequence[float], values: Sequence[float], name: str) -> str:
    """Return a curve: means over at most MAX_POINTS bins of steps, and the range of each as a band."""
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


@chart
def histogram(series: Mapping[str, np.ndarray], limits: tuple[float, float], bins: int, name: str) -> str:
    """Return overlaid histograms with one colour each (at most two)."""
    figure, axes = _figure(3.6, 1.9)
    for values, colour in zip(series.values(), (COLOURS["customcontrast"], COLOURS["copy"]), strict=False):
        axes.hist(values, bins=bins, range=limits, color=colour, alpha=0.55)
    axes.set_xlabel("degrees between viewing directions")
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    return _svg(figure, name)


@chart
def heat_map(values: np.ndarray, labels: Sequence[str], name: str) -> str:
    """Return a square matrix of cosines, with one tick label centred on each run of equal labels."""
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


def standalone(svg: str) -> str:
    """Return a chart with the page's light colours in it, to be shown outside the page, as in a notebook."""
    css = (Path(__file__).parent / "templates" / "page.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"(--[a-z0-9_]+): (#[0-9a-f]{6});", css.partition("}")[0]))
    return re.sub(r"var\((--[a-z0-9_]+)\)", lambda match: light[match[1]], svg)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure of `width` x `height` inches and its axes, without a GUI backend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Any, name: str) -> str:
    """Return the figure as an SVG element; ids are salted with `name`, so that charts on one page do not share them."""
    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    # Ids of figure parts ("axes_1") repeat across charts; nothing refers to them.
    return re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick|\w+Collection|legend)[^"]*"', "", text)
