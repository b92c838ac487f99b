"""Stage: whatever the other stages left -> data/report/index.html, one page that needs nothing else.

`python -m eval.report`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.pictures import Album
from eval.sections import SECTIONS, Missing, ReportParams, Sources, inputs, read_json
from params import cli, data_dir, load
from pipelines.storage import Roots, SourceParams
from stage import write_text

TEMPLATE = "report.html.j2"


def page(sources: Sources) -> str:
    """Return the page: same tables and photos, same text."""
    shown: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, section in SECTIONS.items():
        try:
            shown[name] = section(sources)
        except Missing as stage:
            missing[name] = str(stage)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["score"] = lambda value: "–" if value is None else f"{value:.3f}"
    environment.filters["svg"] = Markup  # charts are made here, and matplotlib escapes the texts in them
    return environment.get_template(TEMPLATE).render(
        title=sources.params.title,
        sections=shown,
        missing=missing,
        settings=settings(sources.data),
        inputs=[*inputs(sources), *weights(sources.data)],
    )


def settings(data: Path) -> dict[str, str]:
    """Return what the results were made with, as the stages recorded it; a stage that has not run adds nothing."""
    made, scored = (_recorded(data / stage / "protocol.json", stage) for stage in ("generate", "score"))
    chosen = made.get("protocol", {})
    prompts = "all" if chosen.get("prompts") is None else chosen["prompts"]
    words = {
        "variant": made.get("variant") or scored.get("variant"),
        "picture side": f"{made['resolution']} px" if made else None,
        "sampler": f"{made['steps']} DDIM steps, guidance {made['guidance_scale']}" if made else None,
        "visual branch": f"strength {made['strength']}, location masks {'on' if made['location_masks'] else 'off'}"
        if made
        else None,
        "prompts a subject": f"{prompts}, {chosen['images']} each; {chosen['reconstructions']} reconstructions"
        if chosen
        else None,
        "reference": {"first": "first photo with a usable mask", "all": "each photo with a usable mask"}.get(
            chosen.get("reference", "")
        ),
        "seed": str(chosen["seed"]) if chosen else None,
        "subject not found": {"zero": "counts 0", "skip": "left out", "unsegmented": "compared whole"}.get(
            scored.get("miss", "")
        ),
    }
    return {name: value for name, value in words.items() if value is not None}


def weights(data: Path) -> list[tuple[str, str]]:
    """Return (what, hash) of the weights that made and scored the pictures, as the stages recorded them."""
    made, scored = (_recorded(data / stage / "protocol.json", stage) for stage in ("generate", "score"))
    named = {**made.get("weights", {}), **scored.get("encoders", {})}
    return [
        (f"{role}: {path}", digest)
        for role, (path, _, digest) in sorted((r, v.rpartition("@")) for r, v in named.items())
    ]


def _recorded(file: Path, stage: str) -> dict[str, Any]:
    try:
        return read_json(file, stage)
    except Missing:
        return {}


def main() -> None:
    params, data = load("report", ReportParams), data_dir()
    roots = Roots(load("sources", list[SourceParams]))
    sources = Sources(data, Album(data, roots, params.side), params)
    text = page(sources)
    file = data / "report" / "index.html"
    write_text(file, text)
    print(f"report: {file}, {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    cli(main)
