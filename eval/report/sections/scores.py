"""The score table with intervals, beside the published one; similarity vs controllability; groups and subjects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.protocol.prompts import PHOTO
from eval.report import charts
from eval.report.sections.base import (
    NAMES,
    ORACLES,
    PICTURE,
    TITLES,
    Sources,
    intervals,
    main_method,
    name_of,
    read_json,
    scored,
)
from eval.score import metrics
from eval.score.metrics import COPY, HEADLINE, METRICS, REAL
from eval.trial.record import read_results, with_weights
from pipelines import tables

PUBLISHED = Path(__file__).parents[1] / "published.json"
SIMILARITIES = ("E-CI", "E-DI")
"""Plotted against CT."""
PARTS = {"R": "reconstruction", "E": "editing"}
BY_KIND = (*METRICS, "R-face_i", "E-face_i")
"""Columns of the table by kind of subject, as far as they were measured."""
Summaries = dict[str, dict[str, Any]]


def scores(sources: Sources) -> dict[str, Any]:
    """The score table, scores above real photos, the published table, and scatter plots of both."""
    by_method = scored(sources.data)
    colours = charts.method_colours(by_method)
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    protocol = read_json(sources.data / "score" / "protocol.json", "score")
    for table in published["tables"]:
        table["charts"] = published_charts(table, published["columns"])
    rows = [
        {"id": name, "name": name_of(name), "oracle": name in ORACLES, "colour": colours[name], **values}
        for name, values in by_method.items()
    ]
    return {
        "methods": rows,
        "by_id": {row["id"]: row for row in rows},
        "main": main_method(by_method),
        "main_name": name_of(main_method(by_method)),
        "metrics": METRICS,
        "protocol": protocol,
        "above_real": above_real(by_method),
        "trials": trials(protocol.get("encoders", {})),
        "scatters": scatters(by_method, colours),
        "positions": positions(by_method),
        "further": further(by_method),
        "published": published,
    }


def positions(by_method: Summaries) -> dict[str, Any] | None:
    """Return where each method lies between the base model alone and true renders, and the main one in each prompt
    group; None unless both were scored."""
    found = metrics.positions(by_method)
    if not found:
        return None
    return {
        "rows": [{"name": name_of(method), "values": [of[m] for m in METRICS]} for method, of in found.items()],
        "groups": found.get(main_method(by_method), {}).get("groups", {}),
        "metrics": {name: title.split(":")[0] for name, title in TITLES.items()},
    }


def above_real(by_method: Summaries) -> list[str]:
    """Return the similarities in which the main method scores above real photos of a subject against each other."""
    model, real = by_method.get(main_method(by_method), {}), by_method.get(REAL, {})
    names = [name for name, (metric, _) in HEADLINE.items() if metric in ("clip_i", "dino_i")]
    return [n for n in names if model.get(n) and real.get(n) and model[n]["mean"] > real[n]["mean"]]


def trials(weights: dict[str, str]) -> dict[str, Any] | None:
    """Return how the similarities with these weights, by encoder, did in the stored trials; None if in none."""
    found = with_weights(read_results(), weights)
    names = list(dict.fromkeys(metric for _, values in found for metric in values))
    if not found:
        return None
    rows = [
        {"name": result["name"], "question": result["question"], "values": [values.get(name) for name in names]}
        for result, values in found
    ]
    return {"metrics": names, "rows": rows}


def scatters(by_method: Summaries, colours: dict[str, str]) -> list[dict[str, str]]:
    """Return scatter plots of similarity vs controllability with error bars and a line at real photos."""
    drawn = []
    for name in SIMILARITIES:
        points = [
            charts.Point(name_of(method), colours[method], values["CT"], values[name], method == main_method(by_method))
            for method, values in by_method.items()
            if values["CT"] and values[name]
        ]
        real = by_method.get(REAL, {}).get(name)
        line = (NAMES[REAL].removeprefix("oracle: "), real["mean"]) if real else None
        if points:
            svg = charts.scatter(points, ("CT", name), line, f"scatter-{name}")
            drawn.append({"title": f"{name} vs CT", "svg": svg})
    return drawn


def published_charts(table: dict[str, Any], columns: list[str]) -> list[dict[str, str]]:
    """Return the same for a published table; plotted separately, as its numbers are from a different setup."""
    drawn = []
    for name in SIMILARITIES:
        x, y = columns.index("CT") + 1, columns.index(name) + 1
        points = [
            charts.Point(
                row[0], charts.colour("ink"), _exact(row[x]), _exact(row[y]), row[0].startswith("CustomContrast")
            )
            for row in table["rows"]
            if row[x] is not None and row[y] is not None
        ]
        svg = charts.scatter(points, ("CT", name), None, f"published-{name}-{table['name']}")
        drawn.append({"title": f"{name} vs CT", "svg": svg})
    return drawn


def further(by_method: Summaries) -> dict[str, Any] | None:
    """Return the means of the metrics that are in no published column; None if there are none."""
    columns = [
        (metric, part)
        for metric in sorted({name for values in by_method.values() for name in values["metrics"]})
        for part in PARTS
        if (metric, part) not in HEADLINE.values()
        and any(values["metrics"].get(metric, {}).get(part) for values in by_method.values())
    ]
    if not columns:
        return None
    return {
        "methods": [name_of(name) for name in by_method],
        "rows": [
            {
                "metric": metric,
                "part": PARTS[part],
                "values": [values["metrics"].get(metric, {}).get(part) for values in by_method.values()],
            }
            for metric, part in columns
        ],
    }


def groups(sources: Sources) -> dict[str, Any]:
    """A chart of each metric by prompt group, with intervals; the main method's mean for each subject."""
    by_method = scored(sources.data)
    colours = charts.method_colours(by_method)
    drawn = [name for name in by_method if name != REAL]
    names = sorted({group for name in drawn for group in by_method[name]["groups"]})
    small = []
    for metric, title in TITLES.items():
        rows = {
            group: {
                name: by_method[name]["groups"].get(group, {}).get(metric)
                for name in drawn
                if not (name == COPY and metric == "reward")
            }
            for group in names
        }
        if not any(found for row in rows.values() for found in row.values()):
            continue
        real = by_method.get(REAL, {}).get("groups", {}).get(PHOTO, {}).get(metric)
        svg = charts.dots_by_group(rows, colours, real["mean"] if real else None, f"group-{metric}")
        small.append({"title": title, "svg": svg})
    return {
        "charts": small,
        "key": [{"name": name_of(name), "colour": colours[name], "dash": False} for name in drawn]
        + ([{"name": name_of(REAL), "colour": colours[REAL], "dash": True}] if REAL in by_method else []),
        "main_name": name_of(main_method(by_method)),
        "kinds": kind_tables(sources.data),
        "subjects": subject_table(by_method.get(main_method(by_method), {}).get("subjects", {})),
    }


def kind_tables(data: Path) -> list[dict[str, Any]]:
    """Return a table for each column of the sources' groups.csv: the scores of each method by group of subjects."""
    folder = data / "score"
    groups = read_json(folder / "protocol.json", "score").get("subject_groups", {})
    if not groups:
        return []
    rows = tables.read(folder, "scores").to_pylist()
    segmentations = tables.read(folder, "segmentations", [*PICTURE, "segmented"]).to_pylist()
    found = []
    for column, by_value in metrics.by_subject_group(rows, segmentations, groups, intervals(folder)).items():
        lines = [
            (name_of(method), value, values, metrics.columns(values))
            for value, by_method in by_value.items()
            for method, values in by_method.items()
        ]
        lines.sort(key=lambda line: line[0])  # groups of one method below each other; the sort is stable
        shown = [name for name in BY_KIND if any(measured.get(name) for *_, measured in lines)]
        cells = [
            {
                "method": method,
                "group": value,
                "subjects": len(values["subjects"]),
                "values": [measured.get(name) for name in shown],
                "miss_rate": values["miss_rate"],
            }
            for method, value, values, measured in lines
        ]
        found.append({"name": column, "columns": shown, "rows": cells})
    return found


def subject_table(subjects: dict[str, dict[str, dict[str, float | None]]]) -> dict[str, Any] | None:
    """Return the means of each subject in the columns of METRICS, each with a shade, 0..1 from the column's minimum to
    its maximum; None without subjects."""
    columns = [
        column
        for column, (metric, part) in HEADLINE.items()
        if any(of.get(metric, {}).get(part) is not None for of in subjects.values())
    ]
    if not columns:
        return None
    table = {
        subject: [of.get(metric, {}).get(part) for metric, part in (HEADLINE[column] for column in columns)]
        for subject, of in subjects.items()
    }
    spans = [[value for row in table.values() if (value := row[i]) is not None] for i in range(len(columns))]
    return {
        "columns": columns,
        "rows": [
            {
                "subject": subject,
                "cells": [
                    {"value": value, "shade": None if value is None else shade(value, span)}
                    for value, span in zip(values, spans, strict=True)
                ],
            }
            for subject, values in table.items()
        ],
    }


def shade(value: float, column: list[float]) -> float:
    """Return the position of `value` between the minimum and maximum of its column, 0..1; 0.5 if all are equal."""
    low, high = min(column), max(column)
    return 0.5 if high == low else (value - low) / (high - low)


def _exact(value: float) -> metrics.Estimate:
    return {"mean": value, "low": None, "high": None}
