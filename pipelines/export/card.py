"""The dataset card of an export: README.md with the front matter that the Hugging Face hub reads, and its sheet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageOps

from pipelines import tables
from pipelines.export.counts import ANGLE_BIN, ExportCounts
from pipelines.export.formats import Format
from pipelines.export.options import ExportOptions
from pipelines.export.plan import LEFT_OUT, SPLITS
from pipelines.export.records import AND, MEANINGS, schema
from pipelines.export.render import PairImage
from pipelines.photos import licences

CARD = "README.md"
SHEET = "examples.jpg"
LICENCES = "licences.csv"
MOST_CLASSES = 40
"""Rows of the table of classes; the others are summed up."""
TILE, GAP = 192, 8
"""px of an image on the sheet, and between images."""
COLUMNS = 2
"""Pairs beside each other on the sheet."""


def card(form: Format, options: ExportOptions, counts: ExportCounts, identity: str) -> str:
    """Return the card; the same export gives the same text.

    Args:
        identity: of the export: digest of its plan, options and code.
    """
    splits = [split for split in SPLITS if counts.pairs[split]]
    total = sum(counts.pairs.values())
    parts = [
        _front(form, counts, splits, total),
        "# Multi-view pairs",
        f"{total} pairs of photos of {sum(counts.subjects.values())} subjects: a reference, another view of the same"
        f" subject as the target, and the target's caption. Made by the data pipeline of CustomContrast"
        f" (`customcontrast export-pairs --format {form.name}`).",
        f"![Examples: reference and target]({SHEET})",
        "## Reading",
        f"```\n{form.reads(splits, options)}\n```",
        "## Counts",
        _table(("split", "pairs", "subjects"), [(s, counts.pairs[s], counts.subjects.get(s, 0)) for s in splits]),
        _table(("class", "pairs"), _most(counts.classes)),
        _table(("angle between the views", "pairs"), _angles(counts.angles)),
        _table(("licence of the photos", "what it asks", "pairs"), _licences(counts.licences)),
        f"`{LICENCES}` names the licences and authors of each subject's photos." if counts.credited() else "",
        "## What is not in it",
        "Photos that the stages before dropped, and triplets that make no pair.",
        _table(("stage", "reason", "meaning", "number"), _dropped(counts)),
        "## Columns",
        _table(("column", "meaning"), [(name, _meaning(name)) for name in schema(options).names]),
        form.note,
        "## How it was made",
        f"Export {identity}." + (" What the stages counted:" if counts.stages else ""),
        _table(("stage", "counts"), [(stage, _listed(values)) for stage, values in counts.stages.items()]),
        "Options:",
        f"```json\n{json.dumps(options.plain(), indent=2)}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def sheet(rows: Sequence[Mapping[str, PairImage]]) -> Image.Image:
    """Return examples side by side: each pair's reference(s), then its target, on white."""
    width = max(len(row) for row in rows) * (TILE + GAP) + GAP
    lines = -(-len(rows) // COLUMNS)
    page = Image.new("RGB", (min(COLUMNS, len(rows)) * (width + GAP), lines * (TILE + GAP) + GAP), "white")
    for place, row in enumerate(rows):
        left, top = place % COLUMNS * (width + GAP) + GAP, place // COLUMNS * (TILE + GAP) + GAP
        target, *references = row.values()
        for column, made in enumerate([*references, target]):
            tile = ImageOps.contain(made.image.convert("RGB"), (TILE, TILE), Image.Resampling.LANCZOS)
            page.paste(tile, (left + column * (TILE + GAP) + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
    return page


def _front(form: Format, counts: ExportCounts, splits: Sequence[str], total: int) -> str:
    """Return the front matter, which is JSON where YAML would need quotes: names may hold any character."""
    bound = next((n for n in (10**3, 10**4, 10**5, 10**6, 10**7) if total < n), None)
    names = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
    lines = ["---", "task_categories: [text-to-image, image-to-image]", "tags: [subject-driven, multi-view]"]
    lines.append(f"size_categories: [{names.get(bound or 0, '10M<n<100M')}]")
    only = next(iter(counts.licences)) if len(counts.licences) == 1 else licences.UNKNOWN
    if licences.terms(only):
        lines.append(f"license: {only.lower()}")
    elif only != licences.UNKNOWN:
        lines += ["license: other", f"license_name: {json.dumps(only)}"]
    files = [{"split": split, "path": path} for split in splits if (path := form.data_files(split))]
    if files:
        lines.append(f"configs: {json.dumps([{'config_name': 'default', 'data_files': files}])}")
    return "\n".join([*lines, "---"])


def _most(classes: Counter[str]) -> list[tuple[str, int]]:
    ordered = sorted(classes.items(), key=lambda entry: (-entry[1], entry[0]))
    rest = ordered[MOST_CLASSES:]
    return ordered[:MOST_CLASSES] + ([(f"{len(rest)} other classes", sum(count for _, count in rest))] if rest else [])


def _angles(angles: Counter[int | None]) -> list[tuple[str, int]]:
    known = sorted((low, count) for low, count in angles.items() if low is not None)
    rows = [(f"{low}° to {low + ANGLE_BIN}°", count) for low, count in known]
    return rows + ([("no camera poses", angles[None])] if angles[None] else [])


def _licences(counts: Counter[str]) -> list[tuple[str, str, int]]:
    """Return the rows of the licences; where the photos of a pair have several, what each of them asks."""
    rows = []
    for name, count in counts.most_common():
        asked = [licences.terms(part) for part in name.split(AND)]
        rows.append((name, " and ".join("not known here" if one is None else one.text() for one in asked), count))
    return rows


def _dropped(counts: ExportCounts) -> list[tuple[str, str, str, int]]:
    rows = []
    for (stage, reason), count in counts.rejects.items():
        rows.append((stage, reason, tables.REJECT_REASONS.get(reason, "the mask breaks this rule"), count))
    return rows + [("export", reason, LEFT_OUT[reason], count) for reason, count in counts.left_out.items()]


def _meaning(column: str) -> str:
    """Return the meaning of a column; one of an image has the role before it."""
    return MEANINGS.get(column) or next(
        text for end, text in MEANINGS.items() if end[0] == "_" and column.endswith(end)
    )


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; empty without rows."""
    lines = [" | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    if not lines:
        return ""
    return "\n".join(f"| {text} |" for text in (" | ".join(header), " | ".join("---" for _ in header), *lines))
