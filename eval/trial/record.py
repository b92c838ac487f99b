"""Results of trials: stored as JSON, printed as text, and written as docs/metrics_trial.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eval.score.metrics import Estimate
from eval.trial.ranking import ALL
from runtime.files import write_json, write_text
from runtime.text import text_table, unwrapped

Result = dict[str, Any]
"""name, question: what was asked of which photos; encoders: weights by encoder; measures: encoder by metric; intervals;
tables: each a title and the rows of `ranking.table`. The first table answers the question."""

RESULTS = Path(__file__).parent / "results"
"""Results that docs/metrics_trial.md and the report show."""
PAGE = Path(__file__).parents[2] / "docs" / "metrics_trial.md"

INTRODUCTION = """# Metrics on trial

CLIP-I, DINO-I and their like are read as "the subject was kept". Here they are asked where the answer is known: which
of two photos is more similar to a third (the query), one of **the same subject in another pose and place**, or one of
**another subject in the query's pose and place**? A metric of identity prefers the first. Numbers are the share of
questions in which it does: 1 is always, .5 is chance, and below .5 pose and place weigh more than the subject. They are
means over a subject's questions, then over subjects, with bootstrap intervals over subjects (`score.intervals`).
Encoders, crops and cosines are those of the score stage ([metrics.md](metrics.md)): `_i` compares subjects cut out on
white, `_i_whole` whole images.

The toybox's encoders (`weights/toybox`) were trained on its renders. What they reach on renders is a property of this
small world, and what they reach on real photos says nothing about published encoders: run both trials with yours.

    python -m experiments.metric_trial --params configs/sd15.yaml --set toybox.size=256 --out data/renders.json
    customcontrast trial --data data/photos --params data/photos/sources.yaml --params configs/sd15.yaml

The first renders its questions: subject, view, scene and style are known exactly, and the other subject differs in one
attribute only. The second takes the captures of `customcontrast data --stages curate mask`: the other subject is the
one whose photo has the nearest perceptual hash to the query, of the same class if there is one. The views of a capture
mostly share their surroundings, which helps whole images there; in renders the place changes too.

`--encoder NAME KIND PATH [REVISION]` adds an encoder to `score.encoders`. A result stored in `eval/trial/results`
(`--out`) becomes part of this page, and is shown in the report of any run that is scored with the same weights.
"""


def read_results(folder: Path = RESULTS) -> list[Result]:
    """Return the stored results, in the order of their files."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def headline(result: Result) -> dict[str, Estimate]:
    """Return the answer to the result's question over all its subjects, by metric; without those that have none."""
    (row,) = (row for row in result["tables"][0]["rows"] if row["row"] == ALL)
    return {metric: value for metric, value in row["values"].items() if value is not None}


def with_weights(results: Iterable[Result], weights: Mapping[str, str]) -> list[tuple[Result, dict[str, Estimate]]]:
    """Return the results of encoders with these weights, each with its headline for their metrics.

    weights: by encoder, as the score stage records them.
    """
    found = []
    for result in results:
        same = {name for name, of in result["encoders"].items() if weights.get(name) == of}
        values = {m: value for m, value in headline(result).items() if result["measures"][m] in same}
        if values:
            found.append((result, values))
    return found


def text(result: Result) -> str:
    """Return the tables as aligned text."""
    lines = [f"{result['name']}: {result['question']} (chance .5)"]
    for table in result["tables"]:
        metrics = list(table["rows"][0]["values"])
        rows = [
            [row["row"], row["subjects"], row["questions"], *(cell(row["values"][m]) for m in metrics)]
            for row in table["rows"]
        ]
        lines += ["", f"  {table['title']}", text_table(("", "subjects", "questions", *metrics), rows)]
    return "\n".join(lines)


def page(results: Iterable[Result]) -> str:
    """Return the page as Markdown."""
    return unwrapped("\n".join([INTRODUCTION, *map(_section, results)]))


def store(result: Result, file: Path) -> None:
    """Write the result, and docs/metrics_trial.md from all results if the file is in RESULTS."""
    write_json(file, result)
    if file.resolve().parent == RESULTS:
        write_text(PAGE, page(read_results()))


def verdict(result: Result) -> str:
    """Return what the headline says: the metrics from the best to the worst, and those that are wrong more often than
    right."""
    values = headline(result)
    order = sorted(values, key=lambda metric: -(values[metric]["mean"] or 0.0))
    said = "Right most often first: " + ", ".join(f"`{m}` {_short(values[m]['mean'])}" for m in order) + "."
    wrong = [metric for metric in order if (high := values[metric]["high"]) is not None and high < 0.5]
    if wrong:
        names = ", ".join(f"`{metric}`" for metric in wrong)
        said += f" Below chance: {names}; there, pose and place weigh more than the subject."
    return said


def cell(value: Estimate | None) -> str | None:
    """Return a share with its interval, `.87 [.83, .91]`."""
    if value is None or value["low"] is None:
        return None if value is None else _short(value["mean"])
    return f"{_short(value['mean'])} [{_short(value['low'])}, {_short(value['high'])}]"


def _short(share: float | None) -> str:
    return "-" if share is None else f"{share:.2f}".removeprefix("0")


def _section(result: Result) -> str:
    weights = ", ".join(f"{name} `{of}`" for name, of in sorted(result["encoders"].items()))
    level = f"{100 * result['intervals']['level']:.0f} %"
    parts = [f"## {result['name']}\n", f"{result['question']} Encoders: {weights}. Intervals: {level}.\n"]
    for table in result["tables"]:
        metrics = list(table["rows"][0]["values"])
        head = ["", "subjects", "questions", *(f"`{metric}`" for metric in metrics)]
        lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for row in table["rows"]:
            cells = [cell(row["values"][metric]) or "-" for metric in metrics]
            lines.append("| " + " | ".join([row["row"], str(row["subjects"]), str(row["questions"]), *cells]) + " |")
        parts += [f"**{table['title']}**\n", "\n".join(lines) + "\n"]
    return "\n".join([*parts, verdict(result), ""])
