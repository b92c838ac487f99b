"""A line a figure; exit code 1 where one is short. `make bench-train`, or `python -m train.bench [PART ...]`.

It trains on the tables that are in `--data`, with the params of the command line, for a few steps at a time.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from measure import Line, chosen_parts, measured, report
from params import UserError, cli, option_parser
from train.bench.parts import checkpoint, encoders, loop, memory, ranks
from train.bench.setting import Setting, setting_of

PARTS: dict[str, Callable[[Setting], Iterator[Line]]] = {
    part.__name__: part for part in (loop, memory, checkpoint, encoders, ranks)
}


def command_line() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m train.bench", description=__doc__, parents=[option_parser()], allow_abbrev=False
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="the median counts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of a turn (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="two steps, one repeat: to try it")
    parser.add_argument("--work", type=Path, default=Path(".work/bench/train"), help="for files (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures (default: figures.json in that folder)")
    return parser


def main() -> None:
    options = command_line().parse_args()
    chosen = chosen_parts(options.parts, PARTS)
    steps, repeats = (2, 1) if options.tiny else (options.steps, options.repeats)
    for name, value in (("steps", steps), ("repeats", repeats)):
        if value < 1:
            raise UserError(f"--{name} is {value}; give at least 1")
    options.work.mkdir(parents=True, exist_ok=True)
    with setting_of(steps, repeats, options.work) as setting:
        lines = measured(line for part in chosen for line in PARTS[part](setting))
        machine = {"cores": os.cpu_count(), "processor": platform.machine(), "device": str(setting.ranks.device)}
        asked = {"parts": chosen, "variant": setting.variant.name, "steps": steps, "repeats": repeats}
        asked |= {name: getattr(setting.params, name) for name in ("batch", "precision", "zero_stage", "prefetch")}
        code = report(lines, options.json or options.work / "figures.json", machine, asked)
    sys.exit(code)


if __name__ == "__main__":
    cli(main)
