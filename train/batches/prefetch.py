"""The batches of coming steps, read by threads while the device computes, and how long a step waited for its own."""

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

    What a thread does (reading, decoding, augmenting, noise) is a function of the step, so batches are those of
    `Sampler.batch`, bit for bit. Threads, not processes: the work lets go of Python's lock, and nothing is copied.
    """

    def __init__(
        self, sampler: Sampler, rank: int, ranks: int, device: torch.device, *, ahead: int, steps: int
    ) -> None:
        """`ahead` batches are read early, each by a thread of its own (0: when they are asked for), none of a step that
        is not below `steps`."""
        self.sampler, self.rank, self.ranks, self.device = sampler, rank, ranks, device
        self.ahead, self.steps = ahead, steps
        self.waited = 0.0
        """Seconds that `take` waited for reading."""
        self._pool = ThreadPoolExecutor(ahead, "batch", self.start_thread) if ahead else None
        self._waiting: deque[tuple[int, Future[TrainingBatch]]] = deque()

    def take(self, step: int) -> TrainingBatch:
        """The batch of `step` on the device; those of the steps after it are begun.

        An error of a thread is raised here, in its step, as it is.
        """
        asked = time.perf_counter()
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
        self.waited += time.perf_counter() - asked
        return self.sampler.finish(batch, self.device)

    def read(self, step: int) -> TrainingBatch:
        """The batch of a step in the CPU's memory; pinned for a GPU, so that copying it does not hold the step up."""
        batch = self.sampler.read(step, self.rank, self.ranks)
        if self.device.type != "cuda":
            return batch
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)
        }
        return replace(batch, **pinned)

    def start_thread(self) -> None:
        """Pinned memory belongs to the thread's current GPU, which else is the first one for all ranks."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def begin(self, step: int) -> None:
        """Give a step to a thread."""
        assert self._pool is not None
        self._waiting.append((step, self._pool.submit(self.read, step)))

    def drop(self) -> None:
        """Forget what is read ahead."""
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()

    def close(self) -> None:
        """End the threads: at most the batches they are at are still read, and dropped."""
        self.drop()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
