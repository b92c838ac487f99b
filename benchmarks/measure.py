"""Shared by the benchmarks: figures and goals, timing ratios, output."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import write_json
from runtime.timing import turns


@dataclass(frozen=True)
class Line:
    """One figure, with or without a goal.

    Attributes:
        most: whether the goal is an upper bound rather than a lower bound.
        detail: the measurements behind the figure.
    """

    name: str
    value: float
    goal: float | None = None
    most: bool = False
    detail: str = ""

    @property
    def short(self) -> bool:
        """Whether there is a goal and it is missed."""
        return self.goal is not None and (self.value > self.goal if self.most else self.value < self.goal)

    def __str__(self) -> str:
        goal = "-" if self.goal is None else f"{'<=' if self.most else '>='} {self.goal:g}"
        verdict = "" if self.goal is None else "short" if self.short else "ok"
        return f"{self.name:34} {self.value:10.3f}  {goal:>9}  {verdict:5}  {self.detail}".rstrip()


def ratio(
    name: str, ours: Callable[[], Any], plain: Callable[[], Any], count: int, unit: str, goal: float, repeats: int
) -> Line:
    """Return the throughput of `ours` over that of `plain`, both for the same `count` of `unit`s.

    The value is the median of the ratios over `repeats`.
    """
    rows = turns([ours, plain], repeats)
    mine, theirs = (statistics.median(column) for column in zip(*rows, strict=True))
    detail = f"{count / mine:.0f} of {count / theirs:.0f} {unit}s/s, {count} {unit}s"
    return Line(name, statistics.median(other / own for own, other in rows), goal, detail=detail)


def cost(
    name: str, ours: Sequence[float], theirs: Sequence[float], count: int, unit: str, goal: float | None = None
) -> Line:
    """Return the time of `ours` over that of `theirs`, columns of `turns` for the same `count` of `unit`s.

    The value is the median of the ratios over repeats; the goal is an upper bound.
    """
    mine, other = (1000 * statistics.median(column) / count for column in (ours, theirs))
    value = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return Line(name, value, goal, most=True, detail=f"{mine:.1f} of {other:.1f} ms/{unit}, {len(ours)} repeats")


def chosen_parts(asked: Sequence[str], known: Collection[str]) -> list[str]:
    """Return the parts that a command line names; all if it names none.

    Raises:
        UserError: there is no such part.
    """
    unknown = [part for part in asked if part not in known]
    if unknown:
        raise UserError(f"there is no part '{unknown[0]}'; choose from {', '.join(known)}")
    return list(asked or known)


def measured(lines: Iterable[Line]) -> list[Line]:
    """Return the lines, printing each as soon as it is measured."""
    found = []
    for line in lines:
        print(line, flush=True)
        found.append(line)
    return found


def report(lines: Sequence[Line], file: Path, machine: dict[str, Any], asked: dict[str, Any]) -> int:
    """Print all lines as a table, write them to `file` and return the exit code: 1 if a goal is missed."""
    print(f"\n{'figure':34} {'value':>10}  {'goal':>9}", *lines, sep="\n")
    figures = [asdict(line) | {"ok": not line.short} for line in lines]
    write_json(file, {"machine": machine, "asked": asked, "figures": figures})
    return 1 if any(line.short for line in lines) else 0
