"""Run the pipeline with DVC: what comes, where it stands, and what to look at afterwards (`make repro`).

Words after the command go to `dvc repro`, such as a stage's name or --force.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from runtime.params import Params
from runtime.stages import SECONDS, stages
from runtime.text import text_table

RECORD = "CUSTOMCONTRAST_REPRO"
"""Environment variable: the file in which the stages of a run write when they began."""
LEAST = 20
"""Seconds of SECONDS that must have passed before there is a pace."""
WIDTH = 24
"""Characters of the bar."""
REPORT = Path("data/report/index.html")
LOOK = """
report: {report}
    images beside their photos, scores with intervals, masks, curves, and what was dropped and why
next:   customcontrast sample --adapter data/train/adapter --help
    draws with the adapter that was just trained"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="passed on to dvc repro")


def main(options: argparse.Namespace) -> int:
    """Run `dvc repro`; return its exit code."""
    params, names = Params.read(), list(stages())
    minutes = round(sum(SECONDS.values()) / 60)
    print(f"repro: {len(names)} stages, {names[0]} to {names[-1]}; those whose inputs are unchanged are skipped")
    print(f"repro: about {minutes} minutes on two quiet cores, with params.yaml as it is shipped")
    print("repro: Ctrl-C stops it at any moment, and the same command goes on from there", flush=True)
    record = Path(params.run.work if "://" not in params.run.work else ".work") / "repro.jsonl"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("", encoding="utf-8")
    began = time.time()
    command = [sys.executable, "-m", "dvc", "repro", *options.words]
    # Stages are run by the command beside this interpreter, whether or not its environment is active.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    code = interruptible(command, os.environ | {RECORD: str(record.resolve()), "PATH": path})
    if code:
        return code
    print(summary(read(record), began, time.time()))
    if REPORT.is_file():
        print(LOOK.format(report=REPORT.resolve()))
    return 0


def interruptible(command: list[str], environment: dict[str, str]) -> int:
    """Run a command that gets Ctrl-C itself, as part of the terminal's group; return its exit code."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        # The child must not inherit that Ctrl-C is ignored.
        return subprocess.run(
            command, env=environment, check=False, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        ).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def stage_begins(name: str) -> None:
    """Record that a stage begins and print where the whole stands, if it runs within this command."""
    if record := os.environ.get(RECORD):
        began = [*read(Path(record)), {"stage": name, "time": time.time()}]
        Path(record).write_text("".join(f"{json.dumps(row)}\n" for row in began), encoding="utf-8")
        print(standing(began), flush=True)


def standing(began: list[dict[str, Any]]) -> str:
    """One line: a bar, the last stage that began, time passed and, once there is a pace, time left.

    began: rows of the record, in order; stages that are not in it were skipped.
    """
    names = list(SECONDS)
    place = names.index(began[-1]["stage"])
    whole, before = sum(SECONDS.values()), sum(SECONDS[name] for name in names[:place])
    full = round(WIDTH * before / whole)
    line = f"[{'=' * full}{' ' * (WIDTH - full)}] {place + 1} of {len(names)}: {names[place]}"
    if passed := began[-1]["time"] - began[0]["time"]:
        line += f"; {clock(passed)} so far"
    typical = sum(SECONDS[row["stage"]] for row in began[:-1])
    if typical >= LEAST:
        line += f", about {max(1, round((whole - before) * passed / typical / 60))} min left"
    return line


def summary(began: list[dict[str, Any]], start: float, end: float) -> str:
    """A table of the stages that ran, with their times."""
    if not began:
        return "repro: every stage is up to date"
    ends = [row["time"] for row in began[1:]] + [end]
    rows = [(row["stage"], clock(until - row["time"])) for row, until in zip(began, ends, strict=True)]
    return text_table(("stage", "time"), [*rows, ("all", clock(end - start))])


def read(record: Path) -> list[dict[str, Any]]:
    """The rows of the record; empty if there is none."""
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()] if record.is_file() else []


def clock(seconds: float) -> str:
    """`m:ss`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
