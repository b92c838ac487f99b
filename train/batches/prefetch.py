"""Batches of upcoming steps, read by threads while the device computes, and how long steps waited for them."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch

from model.objective import TrainingBatch
from train.batches.sampler import Sampler


class Batches:
    """One rank's batches, step after step.

    A thread's work (reading, decoding, augmenting, noise) is a function of the step, so batches equal those of
    `Sampler.batch` bit for bit. Threads, not processes: the work releases the GIL, and nothing is copied.
    """

    def __init__(
        self, sampler: Sampler, rank: int, ranks: int, device: torch.device, *, ahead: int, steps: int
    ) -> None:
        """Prefetch `ahead` batches, one thread each (0: read on request), never for steps from `steps` on."""
        self.sampler, self.rank, self.ranks, self.device = sampler, rank, ranks, device
        self.ahead, self.steps = ahead, steps
        self.waited = 0.0
        """Seconds that `take` waited for reading."""
        self._pool = ThreadPoolExecutor(ahead, "batch", self.start_thread) if ahead else None
        self._waiting: deque[tuple[int, Future[TrainingBatch]]] = deque()

    def take(self, step: int) -> TrainingBatch:
        """The batch of `step` on the device; starts reading those of the steps after it.

        An error in a thread is raised here unchanged, at its step.
        """
        started = time.perf_counter()
        if self._pool is None:
            batch = self.read(step)
        else:
            if not self._waiting or self._waiting[0][0] != step:  # the first step, or a jump
                self.drop()
                self.begin(step)
            first = self._waiting.popleft()[1]
            while len(self._waiting) < self.ahead and step + len(self._waiting) + 1 < self.steps:
                self.begin(step + len(self._waiting) + 1)
            batch = first.result()
        self.waited += time.perf_counter() - started
        return self.sampler.finish(batch, self.device)

    def read(self, step: int) -> TrainingBatch:
        """The batch of a step in CPU memory; pinned for a GPU, so that the copy does not block the step."""
        batch = self.sampler.read(step, self.rank, self.ranks)
        if self.device.type != "cuda":
            return batch
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)
        }
        return replace(batch, **pinned)

    def start_thread(self) -> None:
        """Select the rank's GPU: pinned memory belongs to the thread's current one, by default the first."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def begin(self, step: int) -> None:
        """Submit a step to a thread."""
        assert self._pool is not None
        self._waiting.append((step, self._pool.submit(self.read, step)))

    def drop(self) -> None:
        """Discard prefetched batches."""
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()

    def close(self) -> None:
        """Stop the threads; at most the batches in progress are still read, then discarded."""
        self.drop()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
