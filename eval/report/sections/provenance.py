"""What the page was made from: settings, counts of the stages, hashes of tables and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.report.sections.base import STAGES, Missing, Sources, read_json
from pipelines import tables
from runtime.digest import digest_files


def stages(sources: Sources) -> dict[str, Any]:
    """What each stage counted, from its metrics.json."""
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
    """Return (table or file, hash of its bytes) of everything a stage has left."""
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
        "reference": {
            "first": "first photo with a usable mask",
            "all": "each photo with a usable mask",
            "leave_one_out": "each photo with a usable mask, compared with the others",
        }.get(chosen.get("reference", "")),
        "seed": str(chosen["seed"]) if chosen else None,
        "subject not found": {"zero": "counts 0", "skip": "left out", "unsegmented": "compared whole"}.get(
            scored.get("miss", "")
        ),
        "protocol": made.get("id"),
        "protocol of the scores": f"{scored['id']}: other pictures than these; run score again"
        if made and scored and scored.get("id") != made.get("id")
        else None,
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
