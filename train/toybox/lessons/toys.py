"""The world of toys: its training sets, and what a toy's image shows and its captions tell."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from pipelines.toybox import world
from pipelines.toybox.rendering import styles
from pipelines.toybox.world import Item
from train.toybox.lessons.worlds import DetectorQuery, Sheet, World

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "family": world.FAMILIES,
    "colour": world.COLOURS,
    "second": world.COLOURS,
    "pattern": world.PATTERNS,
    "scene": world.SCENES,
    "style": world.STYLES,
    "dress": ("none", *world.ACCESSORIES),
    "shape": ("own", *world.SHAPES),
}
"""`colour` is the main one, `second` the pattern's."""

DETAILS = ("full", "colour", "noun")
_FULL = ("family", "colour", "pattern", "scene", "style", "dress", "shape")
NAMED = {
    "full": _FULL,
    "colour": tuple(name for name in _FULL if name != "pattern"),
    "noun": tuple(name for name in _FULL if name not in ("pattern", "colour")),
}

NEGATIVES = 0.2
"""Fraction of images queried for a family they do not show; the target is no box."""


@dataclass(frozen=True)
class ToySet:
    """A `LessonSet` of toys.

    held_out: only the subjects reserved for evaluation, only the others, or (None) both. style, shape, accessory:
    probabilities as in `world.sample_look`.
    """

    name: str
    seed: int
    subjects: int
    views: int
    held_out: bool | None
    style: float
    shape: float
    accessory: float

    def __len__(self) -> int:
        return self.subjects * self.views

    def item(self, index: int) -> Item:
        """Subject, view and look of one image."""
        which, view = divmod(index, self.views)
        subject = world.sample_subject(np.random.default_rng([self.seed, which]), kept=self.held_out)
        rng = np.random.default_rng([self.seed, which, 1 + view])
        look = world.sample_look(
            rng, style=self.style, shape=self.shape, accessory=self.accessory, family=subject.family
        )
        side = world.widest(look)
        return subject, world.sample_view(rng, float(rng.uniform(-side, side))), look

    def captions(self, index: int) -> list[str]:
        subject, _, look = self.item(index)
        return [
            world.caption(subject, look, variant=variant, detail=cast(world.Detail, detail))
            for variant in range(len(world.TEMPLATES))
            for detail in DETAILS
        ]


SETS = {
    spec.name: spec
    for spec in (
        ToySet("pictures", 11, 81_600, 1, False, style=0.35, shape=0.10, accessory=0.30),
        ToySet("judged", 15, 48_000, 1, None, style=0.35, shape=0.10, accessory=0.30),
        ToySet("views", 12, 6_000, 6, False, style=0.10, shape=0.0, accessory=0.15),
        ToySet("pictures-test", 13, 1_920, 1, True, style=0.35, shape=0.10, accessory=0.30),
        ToySet("views-test", 14, 480, 4, True, style=0.0, shape=0.0, accessory=0.0),
    )
}


def attribute_row(item: Item) -> list[int]:
    """The values of `ATTRIBUTES` for one image."""
    subject, _, look = item
    names = (
        subject.family,
        subject.colours[0],
        subject.colours[1],
        subject.pattern,
        look.scene,
        look.style,
        look.accessory or "none",
        look.shape or "own",
    )
    return [values.index(name) for name, values in zip(names, ATTRIBUTES.values(), strict=True)]


def visible(table: NDArray[np.int16]) -> NDArray[np.bool_]:
    """Which attributes an image shows.

    A subject in another's shape hides its family; a sketch hides the colours and the pattern (two colours may be
    equally bright); a plain surface hides the second colour.
    """
    coloured = np.array([style.coloured for style in styles.STYLES.values()])[TOYS.column(table, "style")]
    patterned = TOYS.column(table, "pattern") != ATTRIBUTES["pattern"].index("plain")
    return TOYS.only(table, family=_own(table), colour=coloured, pattern=coloured, second=coloured & patterned)


def asked(table: NDArray[np.int16]) -> NDArray[np.bool_]:
    return visible(table) & TOYS.only(table, dress=TOYS.column(table, "dress") > 0)


def prompt(rng: np.random.Generator, held_out: bool) -> tuple[str, list[int]]:
    subject = world.sample_subject(rng, kept=held_out)
    look = world.sample_look(rng, style=0.35, shape=0.1, accessory=0.4, family=subject.family)
    return world.caption(subject, look), attribute_row((subject, world.sample_view(rng), look))


def families(table: NDArray[np.int16]) -> NDArray[np.int64]:
    return TOYS.column(table, "family").astype(np.int64)


def _own(table: NDArray[np.int16]) -> NDArray[np.bool_]:
    return TOYS.column(table, "shape") == ATTRIBUTES["shape"].index("own")


def _another(phrases: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    return (phrases + rng.integers(1, len(world.FAMILIES), len(phrases))) % len(world.FAMILIES)


def ask(table: NDArray[np.int16], rng: np.random.Generator) -> DetectorQuery:
    """The family or, in `NEGATIVES` of the images, another. A subject in another's shape ("a ball shaped mug") is
    labelled with its own noun, but never a negative."""
    right = families(table)
    shown = ~((rng.random(len(table)) < NEGATIVES) & _own(table))
    return DetectorQuery(np.where(shown, right, _another(right, rng)), shown, np.zeros(len(table), bool))


def examine(table: NDArray[np.int16], rng: np.random.Generator) -> tuple[DetectorQuery, NDArray[np.int64]]:
    """The family and another; `shown` is False of a subject in another's shape."""
    right = families(table)
    return DetectorQuery(right, _own(table), np.zeros(len(table), bool)), _another(right, rng)


TOYS = World(
    name="toys",
    weights=Path("weights/toybox"),
    work=Path(".work/toybox-train"),
    attributes=ATTRIBUTES,
    sets=SETS,
    render=world.render,
    row=attribute_row,
    visible=visible,
    asked=asked,
    prompt=prompt,
    vocabulary=world.VOCABULARY,
    details=DETAILS,
    named=NAMED,
    noun="family",
    phrases=world.FAMILIES,
    subject_phrase=families,
    ask=ask,
    examine=examine,
    painted={"family": 0.90, "colour": 0.85, "pattern": 0.75, "scene": 0.95, "style": 0.90, "dress": 0.80},
    judged=dict.fromkeys(("family", "colour", "pattern", "scene", "style", "dress"), 0.97),
    sheet=Sheet(
        Path("docs/toybox_samples.png"),
        ("ball", "box", "can", "cone", "ring", "mug", "mushroom", "duck"),
        (
            "a photo of a red {} on the beach",
            "a photo of a blue striped {} in the snow",
            "a photo of a yellow {} with purple dots on the grass",
            "a photo of a green two tone {} in the city",
            "a photo of a white {} wearing a hat on a wooden table",
            "a cartoon of a pink {} in front of a brick wall",
        ),
    ),
)
