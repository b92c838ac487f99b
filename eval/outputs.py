"""How the stages of this package write and tell: whole files, progress, tables of text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from model.backbones.variant import Spec
from stage import digest, digest_files, write_text


def weights_name(spec: Spec) -> str:
    """Return `<path or hub id>@<digest>`, which changes with the bytes of local weights, or the pinned revision.

    Of an absolute path the last part is named, so that the name is the same on every machine.
    """
    bytes_of = digest_files(spec.local) if spec.local.exists() else None
    path = Path(spec.path).expanduser()
    name = path.name if path.is_absolute() else spec.path
    return f"{name}@{digest(spec.model_dump(exclude={'path'}), bytes_of)[:12]}"


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file with a header line."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(file, stream.getvalue())


def text_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as aligned columns, the first to the left, the others to the right; None is a dash."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *others = row
        parts = [
            first.ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)),
        ]
        lines.append("  " + "  ".join(parts).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
