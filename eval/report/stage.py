"""Stage: results of the other stages -> data/report/index.html, one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.report import STAGE
from eval.report.album import Album
from eval.report.sections import SECTIONS, Missing, ReportParams, Sources
from eval.report.sections.provenance import inputs, settings, weights
from pipelines.photos.roots import Roots, SourceParams
from runtime.files import write_text
from runtime.params import Params

LARGE = 10_000_000  # bytes
DEFAULT = Path("data")
"""The folder that `dvc repro` fills."""
TEMPLATES = Path(__file__).parent / "templates"


def page(sources: Sources) -> str:
    """Return the page; deterministic in the tables and photos."""
    shown: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, section in SECTIONS.items():
        try:
            shown[name] = section(sources)
        except Missing as stage:
            missing[name] = str(stage)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=sources.params.title,
            sections=shown,
            missing=missing,
            place=None if sources.data == DEFAULT else str(sources.data),
            settings=settings(sources.data),
            inputs=[*inputs(sources), *weights(sources.data)],
        )
    )


def environment() -> Environment:
    """Return the Jinja environment of this package: everything is escaped, an undefined name is an error."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    found.filters["score"] = lambda value: "–" if value is None else f"{value:.3f}"
    found.filters["estimate"] = estimate
    found.filters["position"] = lambda value: "" if value is None else f"{value:.2f}"
    found.filters["svg"] = Markup  # charts are our own, and matplotlib escapes their text
    return found


def estimate(value: dict[str, float | None] | None, signed: bool = False) -> Markup:
    """Return a mean with its interval below it."""
    if value is None or value["mean"] is None:
        return Markup("–")
    number = "{:+.3f}" if signed else "{:.3f}"
    if value["low"] is None:
        return Markup(number).format(value["mean"])
    template = Markup(f'{number}<span class="ci">{number} to {number}</span>')
    return template.format(value["mean"], value["low"], value["high"])


def main(params: Params) -> None:
    """Run the stage."""
    report, data = params.section("report", ReportParams), params.data
    roots = Roots(params.section("sources", list[SourceParams]))
    text = page(Sources(data, Album(data, roots, report.side), report))
    file = data / STAGE.name / "index.html"
    write_text(file, text)
    size = len(text.encode())
    print(f"report: {file}, {size / 1e6:.1f} MB")
    if size > LARGE:
        print("  slow to open on a phone: lower report.side, or the numbers of images below it in params.yaml")
