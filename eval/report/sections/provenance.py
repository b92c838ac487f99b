"""Provenance of the page: settings, counts of the stages, hashes of tables and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.report.sections.base import STAGES, Missing, Sources, read_json
from pipelines import tables
from runtime.digest import digest_files


def stages(sources: Sources) -> dict[str, Any]:
    """Counts of each stage, from its metrics.json."""
    rows = []
    for stage in STAGES:
        file = sources.data / stage / "metrics.json"
        values = read_json(file, stage) if file.is_file() else None
        known = ("input", "kept", "rejected")
        plain = {k: v for k, v in (values or {}).items() if isinstance(v, int | float) and k not in known}
        rows.append(
            {"name": stage, "ran": values is not None, "more": plain, **{k: (values or {}).get(k) for k in known}}
        )
    return {"rows": rows}


def inputs(sources: Sources) -> list[tuple[str, str]]:
    """Return (table or file, hash of its bytes) of every stage output."""
    found = []
    for stage in STAGES:
        folder = sources.data / stage
        names = sorted({part.parent.name for part in folder.glob("*/part-*.parquet")})
        found += [(f"{stage}/{name}", digest_files(*tables.parts(folder, name))) for name in names]
        for extra in ("adapter", "losses.csv"):
            if (folder / extra).exists():
                found.append((f"{stage}/{extra}", digest_files(folder / extra)))
    return found


def settings(data: Path) -> dict[str, str]:
    """Return the settings of the results, as the stages recorded them; a stage that has not run adds none."""
    made, scored = (_recorded(data / stage / "protocol.json", stage) for stage in ("generate", "score"))
    chosen = made.get("protocol", {})
    here = "steps" in made  # some of the images were generated here
    prompts = "all" if chosen.get("prompts") is None else chosen["prompts"]
    shown = {
        "variant": made.get("variant") or scored.get("variant"),
        "image size": f"{made['resolution']} px" if here else None,
        "sampler": f"{made['steps']} DDIM steps, guidance scale {made['guidance_scale']}" if here else None,
        "visual branch": f"scale {made['strength']}, location masks {'on' if made['location_masks'] else 'off'}"
        if here
        else None,
        "prompts per subject": f"{prompts}, {chosen['images']} each; {chosen['reconstructions']} reconstructions"
        if here
        else None,
        "made elsewhere": "; ".join(
            f"{name}: {of['images']} images of {', '.join(of['sizes'])} px, "
            f"{of['references_known']} with a known reference"
            for name, of in made.get("imported", {}).items()
        )
        or None,
        "reference": {
            "first": "first photo with a usable mask",
            "all": "each photo with a usable mask",
            "leave_one_out": "each photo with a usable mask, excluded from the comparison",
        }.get(chosen.get("reference", "")),
        "seed": str(chosen["seed"]) if here else None,
        "subject not found": {"zero": "counts as 0", "skip": "excluded", "unsegmented": "whole image compared"}.get(
            scored.get("miss", "")
        ),
        "protocol": made.get("id"),
        "protocol of the scores": f"{scored['id']}: scores of other images; run score again"
        if made and scored and scored.get("id") != made.get("id")
        else None,
    }
    return {name: value for name, value in shown.items() if value is not None}


def weights(data: Path) -> list[tuple[str, str]]:
    """Return (role and path, hash) of the weights used to generate and score, as the stages recorded them."""
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
