"""Live progress of a run: a bar or log lines, `log.jsonl`, TensorBoard. None of it is an output of the stage."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from runtime.errors import UserError
from runtime.files import write_text
from runtime.progress import SECONDS_BETWEEN_LINES
from train.logs.log import ACCURACIES, LOSSES, OF_THE_UPDATE, Record

LOG = "log.jsonl"
# Columns of a window that TensorBoard groups by name; the others are L_diff of a timestep bucket.
GROUPS = dict.fromkeys(LOSSES, "loss") | dict.fromkeys(ACCURACIES, "accuracy") | dict.fromkeys(OF_THE_UPDATE, "update")

SPEED = ("samples_per_second", "waiting", "peak_memory")


class TrainingProgress:
    """A bar on a terminal, otherwise a plain line now and then, and all measurements in files of the run's folder.

    `log.jsonl` holds one object per line. For a window: its columns, samples per second of wall time, the fraction of
    the time so far spent waiting for batches, and this rank's peak memory so far (bytes; resident on the CPU,
    allocated on a GPU). For a validation: its columns under `validation`. For a sample sheet: its file under
    `pictures`. For a warning: its sentence under `warning`.
    """

    def __init__(
        self, record: Record, start: int, folder: Path, device: torch.device, every: float = SECONDS_BETWEEN_LINES
    ) -> None:
        """Resume after `start` steps: log entries of later ones, left by a killed run, are cut off.

        Raises:
            UserError: TensorBoard is enabled but not installed.
        """
        self.record, self.first, self.folder, self.device, self.every = record, start, folder, device, every
        self.params = record.params
        self.step = self.window = start
        self.waited = 0.0
        """Seconds this process's steps waited for their batches."""
        self.board = board(folder, start) if self.params.tensorboard else None
        write_text(folder / LOG, "".join(f"{line}\n" for line in lines_up_to(folder / LOG, start)))
        self.log = (folder / LOG).open("a", encoding="utf-8")
        self.started = self.last = self.last_window = time.monotonic()
        steps = self.params.steps
        self.bar = tqdm(total=steps, initial=start, desc="train", unit="step") if sys.stderr.isatty() else None

    def advance(self) -> None:
        """Report the step just added to the record, and the window and validation it closed."""
        self.step += 1
        self.log_row(self.record.training.ended(self.step - 1), self.record.validation.ended(self.step - 1))
        for sentence in self.record.warnings(self.step - 1):
            self.say(f"train: warning: {sentence}")
            self.note(warning=sentence)
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix(self.numbers() | {"samples/s": f"{self.rate():.1f}"}, refresh=False)
            self.bar.update()
        elif now - self.last > self.every:
            self.last = now
            numbers = " ".join(f"{name} {value}" for name, value in self.numbers().items())
            left = tqdm.format_interval((self.params.steps - self.step) * self.params.samples / self.rate())
            steps = f"step {self.step} of {self.params.steps}"
            print(f"train: {steps}, {numbers}, {self.speed()}, {left} left", flush=True)

    def numbers(self) -> dict[str, str]:
        """Total loss and accuracies of the open window, else of the last one."""
        window = self.record.training.latest()
        wanted = {"total": "total", "cscl_accuracy": "cscl", "macl_accuracy": "macl"}
        found = {label: window.get(name) for name, label in wanted.items()}
        return {
            label: f"{value:.4f}" if label == "total" else f"{value:.0%}"
            for label, value in found.items()
            if value is not None
        }

    def log_row(self, window: dict[str, Any] | None, validation: dict[str, Any] | None) -> None:
        """Log the measurements of a window or a validation."""
        if window is not None:
            now = time.monotonic()
            samples = (self.step - self.window) * self.params.samples
            speed = {
                "samples_per_second": round(samples / max(now - self.last_window, 1e-9), 2),
                "waiting": round(self.waiting(), 4),
                "peak_memory": peak_memory(self.device),
            }
            self.window, self.last_window = self.step, now
            self.note(**{name: value for name, value in window.items() if name != "step"}, **speed)
            self.plot(window | speed, "")
        if validation is not None:
            self.note(validation={name: value for name, value in validation.items() if name != "step"})
            self.plot(validation, "validation ")

    def plot(self, values: dict[str, Any], prefix: str) -> None:
        """Log the values that are not None to TensorBoard."""
        if self.board is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    group = GROUPS.get(name, "speed" if name in SPEED else "timesteps")
                    self.board.add_scalar(f"{prefix}{group}/{name}", value, self.step)

    def note(self, **values: Any) -> None:
        """Append a line to the log file."""
        self.log.write(json.dumps({"step": self.step, "time": round(time.time(), 1), **values}) + "\n")
        self.log.flush()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def rate(self) -> float:
        """Overall samples per second since this process began training."""
        return max(self.step - self.first, 1) * self.params.samples / max(time.monotonic() - self.started, 1e-9)

    def waiting(self) -> float:
        """Fraction of this process's training time spent waiting for batches."""
        return self.waited / max(time.monotonic() - self.started, 1e-9)

    def speed(self) -> str:
        """Rate and waiting as text."""
        return f"{self.rate():.1f} samples/s, {self.waiting():.1%} of the time waiting for data"

    def close(self) -> None:
        """Close the bar and the files, and print a summary."""
        if self.bar is not None:
            self.bar.close()
        seconds, steps = time.monotonic() - self.started, self.step - self.first
        self.note(seconds=round(seconds, 1), waiting=round(self.waiting(), 4))
        self.log.close()
        if self.board is not None:
            self.board.close()
        rate = f", {self.speed()}" if steps else ""
        print(f"train: {steps} steps in {seconds:.1f} s{rate}", *self.record.table(), sep="\n", flush=True)


def lines_up_to(file: Path, step: int) -> list[str]:
    """Complete log lines about the first `step` steps; a kill may have truncated the last one."""
    if not file.exists():
        return []
    kept = []
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.decode())
        except (ValueError, TypeError, KeyError):
            continue
    return kept


def board(folder: Path, start: int) -> Any:
    """A TensorBoard writer that hides events after `start` steps, left by a killed run.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "train.tensorboard is true but the package tensorboard is not installed; install the extra `tensorboard`"
            " of this project, or set train.tensorboard to false"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process so far: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
