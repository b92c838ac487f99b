"""Measure the overhead of the trainer relative to the model's own step.

Prints one line per figure; exits 1 if a goal is missed.
It trains on the tables in `--data`, for a few steps at a time.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.measure import Line, chosen_parts, measured, report
from benchmarks.train.parts import baseline, checkpoint, encoders, loop, memory, ranks
from benchmarks.train.setting import TrainSetting, setting_of
from runtime.cli import read_params, shared_options
from runtime.errors import UserError

PARTS: dict[str, Callable[[TrainSetting], Iterator[Line]]] = {
    part.__name__: part for part in (loop, baseline, memory, checkpoint, encoders, ranks)
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timing repeats, of which the median counts (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps per repeat (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="two steps, one repeat: for a trial run")
    parser.add_argument(
        "--work", type=Path, default=Path(".work/bench/train"), help="working folder (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file for the figures (default: figures.json in that folder)")
    shared_options(parser)


def main(options: argparse.Namespace) -> int:
    """Measure the chosen parts; return the exit code."""
    chosen = chosen_parts(options.parts, PARTS)
    steps, repeats = (2, 1) if options.tiny else (options.steps, options.repeats)
    for name, value in (("steps", steps), ("repeats", repeats)):
        if value < 1:
            raise UserError(f"--{name} is {value}; give at least 1")
    options.work.mkdir(parents=True, exist_ok=True)
    with setting_of(read_params(options), steps, repeats, options.work) as setting:
        lines = measured(line for part in chosen for line in PARTS[part](setting))
        machine = {"cores": os.cpu_count(), "processor": platform.machine(), "device": str(setting.ranks.device)}
        asked = {"parts": chosen, "variant": setting.variant.name, "steps": steps, "repeats": repeats}
        asked |= {name: getattr(setting.params, name) for name in ("batch", "precision", "zero_stage", "prefetch")}
        code = report(lines, options.json or options.work / "figures.json", machine, asked)
    return code
