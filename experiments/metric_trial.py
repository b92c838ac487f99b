"""Metrics on trial on renders of the toybox, which knows subject, view, scene and style.

`python -m experiments.metric_trial` renders held-out subjects, and others that differ in one attribute and stand in
their pose and scene; prints which of them the similarities prefer, and stores the result for docs/metrics_trial.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from eval.trial import ranking, record, scoring
from eval.trial.ranking import ALL, Question
from experiments.truth import apart
from pipelines.toybox.layouts import capture
from pipelines.toybox.stage import ToyboxParams
from pipelines.toybox.world import FAMILIES, STYLES, Item, Toy, render, sample_subject
from pipelines.toybox.writing import generator
from runtime.cli import Parser, guarded, read_params
from runtime.errors import UserError

TRIAL = 4
"""Number of this trial's random streams, beside those of the three layouts."""
VIEWS = 5
"""Photos of a capture, as DreamBench has."""
DEGREES = 30.0
"""Least difference of azimuth between two poses."""
POOL = 4000
"""Subjects that changed attributes are taken from; nearly all combinations of colours occur among them."""
AT_ONCE = 8  # subjects rendered and embedded at a time: 50 images each

NAME = "Renders of the toybox"
QUESTION = "Is the subject in another pose and place more similar than another subject in its pose and place?"


def main_colour(subject: Toy, other: Toy) -> Toy | None:
    """The subject with the main colour of `other`; None if that goes with other second and third colours."""
    if other.colours[0] == subject.colours[0] or other.colours[1:] != subject.colours[1:]:
        return None
    return replace(subject, colours=other.colours, rgb=(other.rgb[0], *subject.rgb[1:]))


def second_colour(subject: Toy, other: Toy) -> Toy | None:
    """The subject with the pattern's colour of `other`; None if the subject has no pattern, or as `main_colour`."""
    first, second, third = other.colours
    if subject.pattern == "plain" or second == subject.colours[1] or (first, third) != subject.colours[::2]:
        return None
    return replace(subject, colours=other.colours, rgb=(subject.rgb[0], other.rgb[1], subject.rgb[2]))


def pattern(subject: Toy, other: Toy) -> Toy | None:
    """The subject with the pattern of `other`; None if it is the same."""
    return None if other.pattern == subject.pattern else replace(subject, pattern=other.pattern)


def family(subject: Toy, other: Toy) -> Toy | None:
    """The subject in the form of the family of `other`; None if it is the same."""
    return None if other.family == subject.family else replace(subject, family=other.family)


CHANGES: dict[str, Callable[[Toy, Toy], Toy | None]] = {
    "main colour": main_colour,
    "second colour": second_colour,
    "pattern": pattern,
    "family": family,
}
"""What distinguishes a rival from the subject: (subject, another) -> the subject with that attribute of the other."""
BOTH = "pose and place"
CONDITIONS = ("place", "pose", BOTH, "pose, place and style")
"""What distinguishes the match from the query."""
OTHER_POSE, OTHER_SUBJECT = "another pose of the subject", "another subject in the copied pose"


@dataclass(frozen=True)
class Trial:
    """The images of a subject and what is asked about them; numbers are places in `items`.

    items: the query first. rivals: by attribute. matches: by condition, one of each for every other view. photos: the
    query and the other photos of its capture. copied: the subject in the query's pose in other scenes. fresh: the
    subject in another pose in the same scenes, one for each of `copied`.
    """

    subject_id: str
    items: tuple[Item, ...]
    rivals: dict[str, int]
    matches: dict[str, tuple[int, ...]]
    photos: tuple[int, ...]
    copied: tuple[int, ...]
    fresh: tuple[int, ...]


def far(query: Item, others: Sequence[Item]) -> list[Item]:
    """The items in another pose and another scene than the query."""
    return [
        item
        for item in others
        if apart(item[1].azimuth, query[1].azimuth) >= DEGREES and item[2].scene != query[2].scene
    ]


def trial_of(seed: int, index: int, pool: Sequence[Toy]) -> Trial:
    """The trial of one held-out subject: it depends on seed, index and pool only."""
    rng = generator(seed, TRIAL, index + 1)
    subject = sample_subject(rng, FAMILIES[index % len(FAMILIES)], kept=True)
    query, *others = capture(rng, VIEWS, True, subject)
    items = [query, *others]

    def add(new: Sequence[Item]) -> tuple[int, ...]:
        items.extend(new)
        return tuple(range(len(items) - len(new), len(items)))

    rivals = {}
    for name, change in CHANGES.items():
        changed = [toy for other in pool if (toy := change(subject, other)) is not None]
        if changed:
            (rivals[name],) = add([(changed[rng.integers(len(changed))], *query[1:])])
    _, view, look = query
    elsewhere = far(query, others)
    styles = rng.choice(STYLES[1:], len(elsewhere)).tolist()
    matches = dict(
        zip(
            CONDITIONS,
            (
                add([(subject, view, other) for _, _, other in elsewhere]),
                add([(subject, other, look) for _, other, _ in elsewhere]),
                add(elsewhere),
                add([(subject, v, replace(w, style=s)) for (_, v, w), s in zip(elsewhere, styles, strict=True)]),
            ),
            strict=True,
        )
    )
    again = far(query, capture(rng, VIEWS, True, subject))
    copied, fresh = add([(subject, view, other) for _, _, other in again]), add(again)
    return Trial(f"{index:04d}", tuple(items), rivals, matches, tuple(range(VIEWS)), copied, fresh)


def questions(trial: Trial, first: int, conditions: Sequence[str]) -> list[Question]:
    """Every match of the conditions against every rival, with both as rows; `first`: number of the trial's query."""
    return [
        Question(trial.subject_id, first, first + match, first + rival, (name, condition))
        for condition in conditions
        for match in trial.matches[condition]
        for name, rival in trial.rivals.items()
    ]


def copies(trial: Trial, vectors: np.ndarray) -> Iterator[tuple[str, float]]:
    """Whether copy_paste ranks a copied pose above another pose, and above another subject in it: (row, answer)."""
    copied, fresh, rivals = (
        scoring.excess(vectors, trial.photos, images)
        for images in (trial.copied, trial.fresh, tuple(trial.rivals.values()))
    )
    for answer in ranking.ranked(copied, fresh):
        yield OTHER_POSE, float(answer)
    for answer in ranking.ranked(copied[:, None], rivals[None]).ravel():
        yield OTHER_SUBJECT, float(answer)


def rendered(trials: Sequence[Trial], size: int) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """The images of each trial, uint8 [size, size, 3], with the renderer's own masks of the subject."""
    out = render([item for trial in trials for item in trial.items], size)
    pairs = zip(out.images.numpy(), out.subject_masks.numpy(), strict=True)
    for trial in trials:
        yield list(islice(pairs, len(trial.items)))


def tables_of(trials: Sequence[Trial], vectors: Sequence[scoring.Vectors], intervals: Any) -> list[dict[str, Any]]:
    """The three tables of the result; vectors: of each trial."""
    together = scoring.stacked(list(vectors))
    firsts = np.cumsum([0, *(len(trial.items) for trial in trials)]).tolist()

    def similarity(title: str, conditions: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
        asked = [q for trial, first in zip(trials, firsts, strict=False) for q in questions(trial, first, conditions)]
        answered = {metric: ranking.answers(of, asked) for metric, of in together.items()}
        rows = ranking.table([q.subject for q in asked], [q.rows for q in asked], answered, intervals, names)
        return {"title": title, "rows": rows}

    found = [
        (trial.subject_id, row, answer)
        for trial, of in zip(trials, vectors, strict=True)
        for row, answer in copies(trial, of["dino_i"])
    ]
    answered = {scoring.COPY_PASTE: np.array([answer for _, _, answer in found])}
    copied = ranking.table(
        [subject for subject, _, _ in found],
        [(row,) for _, row, _ in found],
        answered,
        intervals,
        (OTHER_POSE, OTHER_SUBJECT),
    )
    return [
        similarity("By what differs between the two subjects", (BOTH,), (*CHANGES, ALL)),
        similarity("By what differs between the query and the other photo of the subject", CONDITIONS, CONDITIONS),
        {"title": "copy_paste: the subject in a copied pose and another place above", "rows": copied},
    ]


def main(words: Sequence[str]) -> None:
    parser = Parser(prog="python -m experiments.metric_trial", description=__doc__)
    parser.add_argument("--subjects", type=int, default=200, help="held-out subjects (default: %(default)s)")
    parser.add_argument("--name", default=NAME, help="title of the result (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=record.RESULTS / "renders.json", help="file of the result (default: %(default)s)"
    )
    scoring.encoder_options(parser)
    options = parser.parse_args(words)
    if options.subjects < 2:
        raise UserError("--subjects must be at least 2")
    params = read_params(options)
    score, world = scoring.trial_params(params, options.encoder), params.section("toybox", ToyboxParams)
    scorer, weights = scoring.load(params, score)
    pool_rng = generator(world.seed, TRIAL, 0)
    pool = [sample_subject(pool_rng) for _ in range(POOL)]
    trials = [trial_of(world.seed, index, pool) for index in range(options.subjects)]
    vectors = []
    for start in tqdm(range(0, len(trials), AT_ONCE), unit="batch", disable=None):
        for images in rendered(trials[start : start + AT_ONCE], world.size):
            vectors.append(scoring.image_vectors(scorer, images))
    name = f"{options.name}, {world.size} px"
    result = scoring.result(name, QUESTION, score, weights, tables_of(trials, vectors, score.intervals))
    record.store(result, options.out)
    print(record.text(result))
    print(f"trial: {options.out}")


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
