"""Generated images: uncurated, best and worst by score, methods side by side, subjects not found."""

from __future__ import annotations

import io
from itertools import groupby
from typing import Any

from PIL import Image

from eval.protocol.protocol import RECONSTRUCTION
from eval.report.album import Album, InlineImage, inline, sample
from eval.report.sections.base import (
    TITLES,
    Key,
    Missing,
    Sources,
    equally_spaced,
    images,
    imported,
    key_of,
    made,
    main_method,
    missed,
    name_of,
    need,
    scores_by_picture,
)
from eval.score.metrics import Row

RANKS = ("best", "median", "worst")
CORNER = 2  # divides an image's side for the reference in its corner, enough at two device pixels per CSS pixel


def gallery(sources: Sources) -> dict[str, Any]:
    """Rows of images: reference, its segment, the model's image for each prompt; not cherry-picked."""
    params = sources.params
    rows = of_main(made(sources.data))
    if not rows:
        raise Missing("generate")
    every = [(subject, list(members)) for subject, members in groupby(rows, key=lambda row: row["subject_id"])]
    shown = []
    for subject_id, members in every[: params.subjects]:
        first = sorted((row for row in members if row["index"] == 0), key=lambda row: row["prompt_id"])
        shown.append((subject_id, first[: params.pictures]))
    cards = _cards(sources, [row for _, members in shown for row in members])
    photos = sources.album.photos({members[0]["reference"] for _, members in shown})
    subjects = [
        {
            "id": subject_id,
            "class_name": members[0]["class_name"],
            "reference": sources.album.whole(photos.get(members[0]["reference"])),
            "reference_known": members[0]["reference_known"],
            "segment": sources.album.segment(photos.get(members[0]["reference"])),
            "pictures": [cards[key_of(row)] for row in members],
        }
        for subject_id, members in shown
    ]
    return {"subjects": subjects, "total": len(every)}


def picks(sources: Sources) -> dict[str, Any]:
    """The best, median and worst images of each prompt group, by each of the metrics `ranked_by`."""
    need(sources.data, "score", "scores")
    rows = {key_of(row): row for row in of_main(made(sources.data))}
    scores = scores_by_picture(sources.data)
    groups = sorted({row["group"] for row in rows.values()}, key=lambda name: (name != RECONSTRUCTION, name))
    chosen: list[tuple[str, list[tuple[str, list[tuple[str, list[Key]]]]]]] = []
    for metric in sources.params.ranked_by:
        by_group = []
        for group in groups:
            values = {
                key: value
                for key, row in rows.items()
                if row["group"] == group and (value := scores.get(key, {}).get(metric)) is not None
            }
            if values:
                by_group.append((group, best_median_worst(values, sources.params.picks)))
        if by_group:
            chosen.append((metric, by_group))
    keys = {key for _, by_group in chosen for _, ranks in by_group for _, members in ranks for key in members}
    cards = _cards(sources, [rows[key] for key in sorted(keys)])
    segments = _segments(sources, [rows[key] for key in keys])
    return {
        "rankings": [
            {
                "metric": metric,
                "title": TITLES.get(metric, metric),
                "groups": [
                    {
                        "name": group,
                        "ranks": [
                            {
                                "name": rank,
                                "pictures": [
                                    {
                                        **cards[key],
                                        "segment": segments.get(rows[key]["reference"]),
                                        "class_name": rows[key]["class_name"],
                                        "value": scores[key][metric],
                                    }
                                    for key in members
                                ],
                            }
                            for rank, members in ranks
                        ],
                    }
                    for group, ranks in by_group
                ],
            }
            for metric, by_group in chosen
        ]
    }


def best_median_worst(values: dict[Key, float], count: int) -> list[tuple[str, list[Key]]]:
    """Return (rank, keys) of the `count` highest, those around the median and the `count` lowest, without duplicates.

    Ties are in the order of their keys. With few images each rank has fewer.
    """
    order = sorted(values, key=lambda key: (-values[key], key))
    count = min(count, max(len(order) // 3, 1))
    middle = (len(order) - count) // 2
    parts = (order[:count], order[middle : middle + count], order[len(order) - count :])
    shown: set[Key] = set()
    ranks = []
    for rank, part in zip(RANKS, parts, strict=True):
        new = [key for key in part if key not in shown]
        shown.update(new)
        if new:
            ranks.append((rank, new))
    return ranks


def side_by_side(sources: Sources) -> dict[str, Any]:
    """Images of all methods for some prompts, the first of each prompt; empty if only one method was run."""
    rows = [row for row in made(sources.data) if row["index"] == 0 and row["group"] != RECONSTRUCTION]
    main = main_method(row["method"] for row in rows)
    methods = sorted({row["method"] for row in rows}, key=lambda name: (name != main, name))
    by_prompt: dict[Key, dict[str, Row]] = {}
    for row in rows:
        by_prompt.setdefault((row["subject_id"], row["group"], row["prompt_id"]), {})[row["method"]] = row
    common = [of for of in by_prompt.values() if len(of) == len(methods)]
    if len(methods) < 2 or not common:
        return {"methods": [], "rows": []}
    chosen = equally_spaced(common, sources.params.side_by_side)
    cards = _cards(sources, [row for of in chosen for row in of.values()])
    segments = _segments(sources, [row for of in chosen for row in of.values()])
    return {
        "methods": [name_of(method) for method in methods],
        "same_noise": not imported(sources.data).keys() & set(methods),
        "rows": [
            {
                "prompt": of[methods[0]]["prompt"],
                "group": of[methods[0]]["group"],
                "segment": segments.get(shown["reference"]),
                "reference_known": shown["reference_known"],
                "pictures": [cards[key_of(of[method])] for method in methods],
            }
            for of in chosen
            for shown in [_reference_shown([of[method] for method in methods], segments)]
        ],
    }


def misses(sources: Sources) -> dict[str, Any]:
    """How often the subject was not found, by method and group, with examples from the model."""
    need(sources.data, "score", "segmentations")
    lost = missed(sources.data)
    rows = {key_of(row): row for row in made(sources.data)}
    counts: dict[str, dict[str, list[int]]] = {}
    for key, row in rows.items():
        cell = counts.setdefault(row["method"], {}).setdefault(row["group"], [0, 0])
        cell[0] += key in lost
        cell[1] += 1
    groups = sorted({group for by_group in counts.values() for group in by_group})
    main = main_method(counts)
    own = [{**rows[key], "id": "/".join(map(str, key))} for key in sorted(lost) if key in rows and key[0] == main]
    chosen = sample(own, "id", sources.params.misses)
    cards = _cards(sources, chosen)
    return {
        "total": len(own),
        "main": name_of(main),
        "groups": groups,
        "methods": [
            {
                "name": name_of(method),
                "cells": [counts[method].get(group) for group in groups],
                "all": [sum(cell[part] for cell in counts[method].values()) for part in (0, 1)],
            }
            for method in sorted(counts, key=lambda name: (name != main, name))
        ],
        "pictures": [
            {**cards[key_of(row)], "class_name": row["class_name"], "detection": lost[key_of(row)]} for row in chosen
        ],
    }


def of_main(rows: list[Row]) -> list[Row]:
    """Return the rows of the method that the page is about."""
    main = main_method(row["method"] for row in rows)
    return [row for row in rows if row["method"] == main]


def generated(png: bytes, side: int) -> InlineImage:
    """Return a generated image as a data URI."""
    return inline(Image.open(io.BytesIO(png)).convert("RGB"), side)


def _reference_shown(rows: list[Row], segments: dict[str, InlineImage | None]) -> Row:
    """Return the row of one prompt whose reference stands beside the images: a known one first, that can be read."""
    known_first = sorted(rows, key=lambda row: not row["reference_known"])
    return next((row for row in known_first if segments.get(row["reference"])), known_first[0])


def _cards(sources: Sources, rows: list[Row]) -> dict[Key, dict[str, Any]]:
    """Return the grid entry of each image: the image, its prompt, its scores."""
    pngs = images(sources.data, {key_of(row) for row in rows})
    scores, lost = scores_by_picture(sources.data), missed(sources.data)
    return {
        key: {
            "image": generated(pngs[key], sources.params.side),
            "prompt": row["prompt"],
            "group": row["group"],
            "scores": {name: scores[key][name] for name in TITLES if name in scores.get(key, {})},
            "found": key not in lost,
        }
        for row in rows
        if (key := key_of(row)) in pngs
    }


def _segments(sources: Sources, rows: list[Row]) -> dict[str, InlineImage | None]:
    """Return the segmented reference of each image, for its corner, by frame_id."""
    album = Album(sources.data, sources.album.roots, max(sources.params.side // CORNER, 16))
    photos = album.photos({row["reference"] for row in rows})
    return {frame_id: album.segment(photo) for frame_id, photo in photos.items()}
