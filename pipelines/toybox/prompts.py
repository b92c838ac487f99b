"""Prompts of the toybox: what one asks for, as text and as names of the world's tables."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.toybox.rendering.accessories import ACCESSORIES
from pipelines.toybox.rendering.scenes import BLANK, SCENES
from pipelines.toybox.rendering.sdf import FAMILIES
from pipelines.toybox.rendering.styles import STYLES
from pipelines.toybox.world import SHAPES, worn
from runtime.errors import UserError

PLAIN = "photo"
"""The style of an image whose prompt names none; "a photo of" asks for no style either."""


@dataclass(frozen=True)
class Answer:
    """What a prompt asks for, beside the subject; None if unspecified."""

    scene: str | None = None
    style: str | None = None
    accessory: str | None = None
    shape: str | None = None


def prompt(answer: Answer, noun: str) -> str:
    """The prompt that asks for `answer`; noun: of the subject, or a placeholder for it."""
    words = (
        STYLES[answer.style].phrase if answer.style else "",
        "a",
        f"{answer.shape} shaped" if answer.shape else "",
        noun,
        f"wearing {worn(answer.accessory)}" if answer.accessory else "",
        SCENES[answer.scene].phrase if answer.scene else "",
    )
    return " ".join(word for word in words if word)


def asked(text: str) -> Answer:
    """Parse a prompt: what `prompt` writes, with or without "a photo of" before it.

    Raises:
        UserError: a part of it is none of the toybox's phrases.
    """
    styles = {row.phrase: name for name, row in STYLES.items()}
    scenes = {row.phrase: name for name, row in SCENES.items() if name != BLANK}
    dresses = {worn(name): name for name in ACCESSORIES}
    found = re.fullmatch(
        f"(?:(?P<style>{_one_of(styles)}) )?an? (?:(?P<shape>{_one_of(SHAPES)}) shaped )?(?:{_one_of(FAMILIES)})"
        f"(?: wearing (?P<dress>{_one_of(dresses)}))?(?: (?P<scene>{_one_of(scenes)}))?",
        text,
    )
    if found is None:
        raise UserError(
            f"prompt '{text}' is none of the toybox's, which are made of its own scenes, styles, accessories and "
            f"shapes; set generate.protocol.prompt_set to source and reconstruction to 'a photo of a {{class}}'"
        )
    style = styles.get(found["style"])
    return Answer(
        scenes.get(found["scene"]), None if style == PLAIN else style, dresses.get(found["dress"]), found["shape"]
    )


def _one_of(phrases: Iterable[str]) -> str:
    return "|".join(map(re.escape, phrases))
