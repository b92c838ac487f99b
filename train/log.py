"""What a run tells: losses by step for DVC, progress for whoever watches, wall times for nobody's hash."""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

LOSSES = ("diffusion", "cscl", "macl", "location", "total")
COLUMNS = (*LOSSES, "learning_rate", "gradient_norm")
# Share of the run over which the final losses are averaged: single steps differ by their timesteps.
TAIL = 0.1


class LossLog:
    """Means of each `every` steps; a function of the steps alone, so that a resumed run writes the same bytes."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[list[float]] = []
        self.window: list[list[float]] = []

    def add(self, step: int, values: list[float]) -> None:
        """Add the values of COLUMNS of a 0-based step."""
        self.window.append(values)
        if len(self.window) == self.every:
            self.close(step)

    def close(self, step: int) -> None:
        """End the window at this step."""
        if self.window:
            means = torch.tensor(self.window, dtype=torch.float64).mean(dim=0).tolist()
            self.rows.append([step + 1, *means])
            self.window = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"rows": self.rows, "window": self.window}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.rows, self.window = state["rows"], state["window"]

    def final(self) -> dict[str, float]:
        """Mean losses over the last tenth of the run."""
        tail = self.rows[-max(1, round(TAIL * len(self.rows))) :]
        return {name: rounded(sum(row[1 + i] for row in tail) / len(tail)) for i, name in enumerate(LOSSES)}

    def write(self, file: Path) -> None:
        """Write the rows as CSV."""
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(("step", *COLUMNS))
            writer.writerows([row[0], *map(rounded, row[1:])] for row in self.rows)


class Progress:
    """A bar on a terminal, a plain line now and then elsewhere, and a line a window in an untracked log file."""

    def __init__(self, step: int, steps: int, batch: int, log: Path, every: float = 15.0) -> None:
        self.step, self.steps, self.batch, self.every = step, steps, batch, every
        self.begun = self.last = time.monotonic()
        self.first = step
        self.waited = 0.0  # seconds for data
        self.log = log.open("a", encoding="utf-8")
        self.bar = tqdm(total=steps, initial=step, desc="train", unit="step") if sys.stderr.isatty() else None

    def advance(self, losses: dict[str, float]) -> None:
        """Count a step, with its losses."""
        self.step += 1
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix({"total": f"{losses['total']:.4f}"})
        elif now - self.last > self.every:
            self.last = now
            numbers = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
            speed = f"{self.rate():.1f} samples/s, {self.waiting():.1%} of the time waiting for data"
            print(f"train: step {self.step} of {self.steps}, {numbers}, {speed}", flush=True)

    def note(self, **values: Any) -> None:
        """Add a line to the log file."""
        self.log.write(json.dumps({"step": self.step, "time": round(time.time(), 1), **values}) + "\n")
        self.log.flush()

    def rate(self) -> float:
        """Samples a second since this process began to train."""
        return (self.step - self.first) * self.batch / max(time.monotonic() - self.begun, 1e-9)

    def waiting(self) -> float:
        """Share of the time since then that went into waiting for batches."""
        return self.waited / max(time.monotonic() - self.begun, 1e-9)

    def close(self) -> None:
        """End the bar and the log file."""
        if self.bar is not None:
            self.bar.close()
        seconds = time.monotonic() - self.begun
        self.note(
            seconds=round(seconds, 1),
            samples_per_second=round(self.rate(), 2),
            waiting=round(self.waiting(), 4),
        )
        self.log.close()
        speed = f"{self.rate():.1f} samples/s, {self.waiting():.1%} of the time waiting for data"
        print(f"train: {self.step - self.first} steps in {seconds:.1f} s, {speed}", flush=True)


def rounded(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")
