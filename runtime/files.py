"""Atomic file writes: a reader sees the complete new file or the previous one."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import ModelError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def write_text(file: Path, text: str) -> None:
    """Write `text` to `file` atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # frees space on a full disk
        error.filename = str(file)
        raise


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write `values` sorted by key: same values, same bytes. Metrics contain nothing that differs between runs."""
    write_text(file, json.dumps(values, indent=2, sort_keys=True) + "\n")


def write_metrics(folder: Path, values: dict[str, Any], summary: Mapping[str, float | None]) -> None:
    """Write all measurements of a stage to `metrics.json`, and those that `dvc metrics show` prints to `summary.json`.

    The summary is written last: it marks a finished stage.
    """
    write_json(folder / "metrics.json", values)
    write_json(folder / "summary.json", {name: value for name, value in summary.items() if value is not None})


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file with a header line."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(file, stream.getvalue())


def refuse_pointers(files: Iterable[Path]) -> None:
    """Raise ModelError if one of `files` is a git-lfs pointer, which a clone without git-lfs has in place of a file."""
    for file in files:
        if file.is_file():
            with file.open("rb") as stream:
                if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise ModelError(
                        f"{file}: is a git-lfs pointer, not the file itself; run git lfs pull in its folder"
                    )
