"""Prompts of the world of faces, by group: what one asks for, as text and as names of the world's tables."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.toybox.faces.people import (
    EXPRESSIONS,
    HAIR_COLOURS,
    JOBS,
    NOUNS,
    SCENES,
    STYLES,
    WORN_ITEMS,
    Outfit,
    hair_words,
    worn_words,
)
from pipelines.toybox.rendering import scenes, styles
from runtime.errors import UserError


@dataclass(frozen=True)
class Wish:
    """What a prompt asks for, beside the person; None if unspecified."""

    scene: str | None = None
    style: str | None = None
    accessory: str | None = None
    hair_colour: str | None = None
    expression: str | None = None
    job: str | None = None


GROUPS: dict[str, tuple[Wish, ...]] = {
    "style": tuple(Wish(style=name) for name in STYLES[1:]),
    "scene": tuple(Wish(scene=name) for name in SCENES[:8]),
    "accessory": tuple(Wish(accessory=name) for name in WORN_ITEMS),
    "hair": tuple(Wish(hair_colour=name) for name in HAIR_COLOURS),
    "expression": tuple(Wish(expression=name) for name in list(EXPRESSIONS)[1:]),
    "job": tuple(Wish(job=name) for name in JOBS),
}


def prompt(wish: Wish, noun: str) -> str:
    """The prompt that asks for `wish`; noun: of the person, or a placeholder for it."""
    words = (
        styles.STYLES[wish.style].phrase if wish.style else "",
        f"a {noun}{hair_words(wish.hair_colour, None, 'none')}",
        f"as a {wish.job}" if wish.job else "",
        _worn(wish.accessory) if wish.accessory else "",
        EXPRESSIONS[wish.expression].words if wish.expression else "",
        scenes.SCENES[wish.scene].phrase if wish.scene else "",
    )
    return " ".join(word for word in words if word)


def asked(text: str) -> Wish:
    """Parse a prompt: what `prompt` writes, with or without "a photo of" before it.

    Raises:
        UserError: a part of it is none of the world's phrases.
    """
    prefixes = {row.phrase: name for name, row in styles.STYLES.items()}
    places = {scenes.SCENES[name].phrase: name for name in SCENES}
    colours = {hair_words(name, None, "none").strip(): name for name in HAIR_COLOURS}
    jobs, dresses = {f"as a {name}": name for name in JOBS}, {_worn(name): name for name in WORN_ITEMS}
    moods = {row.words: name for name, row in EXPRESSIONS.items() if row.words}
    found = re.fullmatch(
        f"(?:(?P<style>{_one_of(prefixes)}) )?a (?:{_one_of(NOUNS)})(?: (?P<hair>{_one_of(colours)}))?"
        f"(?: (?P<job>{_one_of(jobs)}))?(?: (?P<dress>{_one_of(dresses)}))?(?: (?P<mood>{_one_of(moods)}))?"
        f"(?: (?P<scene>{_one_of(places)}))?",
        text,
    )
    if found is None:
        raise UserError(
            f"prompt '{text}' is none of the world of faces, which are made of its own scenes, styles, accessories, "
            f"hair colours, expressions and jobs; set generate.protocol.prompt_set to source and reconstruction to "
            f"'a photo of a {{class}}'"
        )
    style = prefixes.get(found["style"])
    return Wish(
        places.get(found["scene"]),
        None if style == STYLES[0] else style,
        dresses.get(found["dress"]),
        colours.get(found["hair"]),
        moods.get(found["mood"]),
        jobs.get(found["job"]),
    )


def _worn(accessory: str) -> str:
    return worn_words(Outfit("", accessory=accessory)).strip()


def _one_of(phrases: Iterable[str]) -> str:
    return "|".join(map(re.escape, phrases))
