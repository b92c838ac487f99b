"""Prefetching with threads, so that the next photos of a model are decoded while it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def prefetch(function: Callable[[A], B], items: Iterable[A], threads: int, ahead: int) -> Iterator[B]:
    """Yield `function(item)` for each item, in order, computed by `threads` threads at most `ahead` items in advance.

    Threads, not processes: decoding, resizing and tensor arithmetic release the GIL, and nothing is copied. The items
    themselves are taken in the calling thread, so that they may come from a model. Memory holds `ahead` results. With 0
    threads each result is computed on demand. An exception raised by `function` is raised in its item's place.
    """
    if threads == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[B]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
