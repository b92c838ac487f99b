"""The world of faces: its training sets, and what a person's image shows and its captions tell."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from pipelines.toybox import world as toys
from pipelines.toybox.faces import head, people
from pipelines.toybox.faces.people import Person, Portrait
from pipelines.toybox.rendering import styles
from train.toybox.lessons.worlds import DetectorQuery, Sheet, World

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "noun": people.NOUNS,
    "skin": tuple(people.SKINS),
    "iris": tuple(people.IRISES),
    "hair": tuple(head.HAIR_STYLES),
    "hair_colour": tuple(people.HAIR_COLOURS),
    "beard": tuple(head.BEARDS),
    "expression": tuple(people.EXPRESSIONS),
    "wear": (*people.WORN_ITEMS, *people.JOBS, *people.CLOTHES),
    "scene": people.SCENES,
    "style": people.STYLES,
}
"""`hair_colour` is as shown, which an outfit may change, and the first one of a bald head. `wear` is what a caption
names: the accessory, else the job, else the colour of the clothes."""

EDITS = ("hair_colour", "expression", "wear", "scene", "style")
"""What a prompt may ask of a person."""

DETAILS = ("full", "noun")
_FULL = ("noun", "hair", "hair_colour", "beard", "expression", "wear", "scene", "style")
NAMED = {"full": _FULL, "noun": tuple(name for name in _FULL if name not in ("hair", "hair_colour", "beard"))}

PHRASES = ("head", "person", *people.NOUNS)
"""What is looked for in a photo of a person: the head with its hair alone, or with clothes and all that is worn."""
STRANGE = (*PHRASES, *toys.FAMILIES)
"""With what is in no photo of a person."""
NEGATIVES = 0.2
"""Fraction of images queried for what they do not show: half for the other noun, half for a toy."""

Who = Literal["named", "others", "held out"]


@dataclass(frozen=True)
class FaceSet:
    """A `LessonSet` of people.

    who: the celebrities, other people, or people reserved for evaluation. side: largest azimuth in degrees. style,
    worn, job, hair, expression: probabilities as in `people.sample_outfit`.
    """

    name: str
    seed: int
    subjects: int
    views: int
    who: Who
    side: float
    style: float
    worn: float
    job: float
    hair: float
    expression: float

    def __len__(self) -> int:
        return self.subjects * self.views

    def person(self, which: int) -> Person:
        """Who is shown."""
        if self.who == "named":
            return celebrities()[which][1]
        return people.sample_person(np.random.default_rng([self.seed, which]), self.who == "held out")

    def item(self, index: int) -> Portrait:
        """Person, view and outfit of one image."""
        which, view = divmod(index, self.views)
        who, rng = self.person(which), np.random.default_rng([self.seed, which, 1 + view])
        outfit = people.sample_outfit(
            rng, style=self.style, worn=self.worn, job=self.job, hair=self.hair, expression=self.expression
        )
        if who.hair == "bald":
            outfit = replace(outfit, hair_colour=None)
        framing: people.Framing = "close" if rng.random() < 0.5 else "bust"
        return who, people.sample_portrait_view(rng, framing, side=self.side), outfit

    def captions(self, index: int) -> list[str]:
        who, _, outfit = self.item(index)
        name = celebrities()[index // self.views][0] if self.who == "named" else None
        return [
            people.caption(who, outfit, name, variant, cast(people.Detail, detail))
            for variant in range(len(people.TEMPLATES))
            for detail in DETAILS
        ]


@cache
def celebrities() -> tuple[tuple[str, Person], ...]:
    """Name and person, in the order of set "celebrities"."""
    return tuple(people.celebrities().items())


SETS = {
    spec.name: spec
    for spec in (
        # Half of what text-to-image sees: 64 images make a name.
        FaceSet("celebrities", 21, people.CELEBRITIES, 64, "named", 50, 0.30, 0.25, 0.15, 0.10, 0.5),
        FaceSet("pictures", 22, 12_000, 1, "others", 60, 0.30, 0.30, 0.15, 0.15, 0.6),
        FaceSet("views", 23, 1_800, 6, "others", 75, 0.15, 0.30, 0.15, 0.0, 0.7),
        # Of other people, for the network that measures.
        FaceSet("metric-views", 24, 1_500, 6, "others", 75, 0.15, 0.30, 0.15, 0.0, 0.7),
        FaceSet("judged", 25, 2_400, 1, "held out", 60, 0.30, 0.30, 0.15, 0.15, 0.6),
        FaceSet("pictures-test", 26, 1_920, 1, "held out", 60, 0.30, 0.30, 0.15, 0.15, 0.6),
        FaceSet("views-test", 27, 240, 8, "held out", 75, 0.0, 0.15, 0.0, 0.0, 0.7),
        # Plain photos of the celebrities, whose mean embedding says who an image of text-to-image is.
        FaceSet("names-test", 28, people.CELEBRITIES, 8, "named", 50, 0.0, 0.0, 0.0, 0.0, 0.5),
    )
}


def attribute_row(item: Portrait) -> list[int]:
    """The values of `ATTRIBUTES` for one image."""
    who, _, outfit = item
    colour = outfit.hair_colour or who.hair_colour
    names = (
        who.noun,
        who.skin,
        who.iris,
        who.hair,
        next(iter(people.HAIR_COLOURS)) if who.hair == "bald" else colour,
        who.beard,
        outfit.expression,
        outfit.job or outfit.accessory or outfit.clothes,
        outfit.scene,
        outfit.style,
    )
    return [values.index(name) for name, values in zip(names, ATTRIBUTES.values(), strict=True)]


def visible(table: NDArray[np.int16]) -> NDArray[np.bool_]:
    """Which attributes an image shows: a sketch hides colours, a hat the hair, a bald head its colour."""
    coloured = np.array([style.coloured for style in styles.STYLES.values()])[FACES.column(table, "style")]
    wear = FACES.column(table, "wear")
    hats = ("hat", "crown", *people.JOBS)
    free = ~np.isin(wear, [ATTRIBUTES["wear"].index(name) for name in hats])
    clothed = wear >= len(people.WORN_ITEMS) + len(people.JOBS)
    haired = FACES.column(table, "hair") != ATTRIBUTES["hair"].index("bald")
    return FACES.only(
        table, skin=coloured, iris=coloured, hair=free, hair_colour=coloured & haired, wear=coloured | ~clothed
    )


def asked(table: NDArray[np.int16]) -> NDArray[np.bool_]:
    none = np.zeros(len(table), bool)
    told = FACES.only(
        table,
        skin=none,
        iris=none,
        beard=FACES.column(table, "beard") != ATTRIBUTES["beard"].index("none"),
        expression=FACES.column(table, "expression") != ATTRIBUTES["expression"].index("neutral"),
    )
    return visible(table) & told


def outfit_asked(rng: np.random.Generator, who: Person) -> people.Outfit:
    """A random outfit of a prompt, in which much is asked."""
    outfit = people.sample_outfit(rng, style=0.35, worn=0.3, job=0.25, hair=0.25, expression=0.6)
    return replace(outfit, hair_colour=None) if who.hair == "bald" else outfit


def prompt(rng: np.random.Generator, held_out: bool) -> tuple[str, list[int]]:
    who = people.sample_person(rng, held_out)
    outfit = outfit_asked(rng, who)
    return people.caption(who, outfit), attribute_row((who, people.sample_portrait_view(rng), outfit))


def heads(table: NDArray[np.int16]) -> NDArray[np.int64]:
    return np.full(len(table), PHRASES.index("head"), np.int64)


def ask(table: NDArray[np.int16], rng: np.random.Generator) -> DetectorQuery:
    """The head, the person, the noun, or in `NEGATIVES` of the images what is not there."""
    question, wrong = examine(table, rng)
    shown = rng.random(len(table)) >= NEGATIVES
    return DetectorQuery(np.where(shown, question.phrase, wrong), shown, question.whole)


def examine(table: NDArray[np.int16], rng: np.random.Generator) -> tuple[DetectorQuery, NDArray[np.int64]]:
    count, nouns = len(table), FACES.column(table, "noun").astype(np.int64)
    first = PHRASES.index(people.NOUNS[0])
    kind = rng.integers(0, 3, count)
    phrase = np.select([kind == 0, kind == 1], [PHRASES.index("head"), PHRASES.index("person")], first + nouns)
    toy = rng.integers(len(PHRASES), len(STRANGE), count)
    wrong = np.where(rng.random(count) < 0.5, first + 1 - nouns, toy)
    return DetectorQuery(phrase, np.ones(count, bool), kind > 0), wrong


FACES = World(
    name="faces",
    weights=Path("weights/faces"),
    work=Path(".work/faces-train"),
    attributes=ATTRIBUTES,
    sets=SETS,
    render=people.render,
    row=attribute_row,
    visible=visible,
    asked=asked,
    prompt=prompt,
    vocabulary=people.WORDS,
    details=DETAILS,
    named=NAMED,
    noun="noun",
    phrases=STRANGE,
    subject_phrase=heads,
    ask=ask,
    examine=examine,
    painted={"noun": 0.85, "hair": 0.85, "beard": 0.75, **dict.fromkeys(EDITS, 0.9)},
    judged={"noun": 0.9, "skin": 0.9, "hair": 0.9, "beard": 0.9, **dict.fromkeys(EDITS, 0.95)},
    sheet=Sheet(
        Path("docs/faces_samples.png"),
        ("a man", "a woman", *(name for name, _ in celebrities()[:6])),
        (
            "a photo of {} in the studio",
            "a photo of {} smiling on the beach",
            "a photo of {} as a chef in the city",
            "a photo of {} wearing glasses in the forest",
            "a sketch of {} looking sad",
            "a photo of {} with blue hair in the snow",
        ),
    ),
    names=tuple(name for name, _ in celebrities()),
    whole=0.4,
)
