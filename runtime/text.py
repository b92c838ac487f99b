"""Text tables for terminals and logs, and prose for pages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any


def text_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as aligned columns, the first left-aligned, the others right-aligned; None becomes a dash."""
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


def unwrapped(text: str) -> str:
    """Return prose with each paragraph on one line, as pages here are written; other Markdown stays as it is."""
    return re.sub(r"(?<=[^\n|#])\n(?!\s|[|#<>]|[-*+] |\d+\. |```|\Z)", " ", text)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
