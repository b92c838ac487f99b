"""Times of several ways to do one thing, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any


def seconds(work: Callable[[], Any]) -> float:
    """Return how long `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def turns(works: Sequence[Callable[[], Any]], repeats: int) -> list[tuple[float, ...]]:
    """Return the seconds of each of `works`, a column each, `repeats` rows.

    They run in turns, so that other work on the machine meets all of them. A first turn warms up and is left out.
    """
    return [tuple(seconds(work) for work in works) for _ in range(repeats + 1)][1:]
