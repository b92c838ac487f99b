"""What every stage does at its edges: name work by its content, hold a lock, show progress, write whole files."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from params import UserError

# Plain progress lines are for logs: one in so many seconds says enough.
SECONDS_BETWEEN_LINES = 15.0


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


@contextlib.contextmanager
def exclusive(stage: str, work: Path) -> Iterator[None]:
    """Hold the stage's lock; the kernel frees it when the process ends, however it ends.

    Raises:
        UserError: another process holds it; says which.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / f"{stage}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise UserError(f"stage {stage} is already being run by {holder}; wait for it or stop it") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


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
    """Write `values` sorted by key: same values, same bytes. Metrics hold nothing that differs from run to run."""
    write_text(file, json.dumps(values, indent=2, sort_keys=True) + "\n")
