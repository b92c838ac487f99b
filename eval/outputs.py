"""How the stages of this package write and tell: whole files, progress, tables of text."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.backbones.variant import Spec

# Plain progress lines are for logs: one in so many seconds says enough.
SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """A bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.last = 0, time.monotonic()
        self.bar = tqdm(total=total, desc=label, unit=unit) if sys.stderr.isatty() else None

    def advance(self, count: int) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() - self.last > SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            print(f"{self.label}: {self.done} of {self.total} {self.unit}s", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def digest(*values: Any) -> str:
    """Return 16 hex digits that identify JSON-like values."""
    text = json.dumps(values, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def digest_files(*paths: Path) -> str:
    """Return 16 hex digits that identify the bytes of files and of all files in folders (caches of Python left out)."""
    state = hashlib.blake2b(digest_size=8)
    for path in paths:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            if "__pycache__" not in file.parts:
                state.update(str(file.relative_to(path.parent)).encode())
                with file.open("rb") as stream:
                    state.update(hashlib.file_digest(stream, "blake2b").digest())
    return state.hexdigest()


def weights_name(spec: Spec) -> str:
    """Return `<path or hub id>@<digest>`, which changes with the bytes of local weights, or the pinned revision.

    Of an absolute path the last part is named, so that the name is the same on every machine.
    """
    bytes_of = digest_files(spec.local) if spec.local.exists() else None
    path = Path(spec.path).expanduser()
    name = path.name if path.is_absolute() else spec.path
    return f"{name}@{digest(spec.model_dump(exclude={'path'}), bytes_of)[:12]}"


def write_text(file: Path, text: str) -> None:
    """Write `text` so that a reader sees all of it or what was there before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write `values` sorted by key: same values, same bytes."""
    write_text(file, json.dumps(values, indent=2, sort_keys=True) + "\n")


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
