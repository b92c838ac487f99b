"""Progress of a stage: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0
"""Minimum time between two plain log lines."""


class Progress:
    """Counts units of work up to `total`."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.last = 0, time.monotonic()
        self.bar = tqdm(total=total, desc=label, unit=unit) if sys.stderr.isatty() else None

    def advance(self, count: int) -> None:
        """Count `count` more units as done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() - self.last > SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            print(f"{self.label}: {self.done} of {self.total} {self.unit}s", flush=True)

    def close(self) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
