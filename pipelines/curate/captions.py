"""Captions and the position of the class noun in them: the pseudo-word goes right after it, so every caption has one.

A caption comes from the source (`shipped`), from the captioner if one is set, or from the template. One without the
noun is repaired rather than dropped:

1. If it has only the last word of a noun of several words, that becomes the whole noun: for a teddy bear, "a brown bear
   in snow" becomes "a brown teddy bear in snow".
2. Otherwise, or if the noun ends after more than `max_words` words and a text encoder might truncate it, the template
   is prepended: "a photo of a mug, a cup on a table".
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from pydantic import Field, field_validator

from runtime.params import Section


class CaptionerParams(Section):
    """A BLIP checkpoint in transformers format."""

    path: str  # folder, or hub id
    revision: str | None = Field(pattern=r"^[0-9a-f]{40}$")  # commit of a hub id
    dtype: str
    batch_size: int = Field(ge=1)
    max_tokens: int = Field(ge=1)  # beyond the prompt


class CaptionParams(Section):
    """Where captions come from."""

    template: str  # {class} is the class noun; also the prefix of the captioner's sentences
    max_words: int = Field(ge=1)  # up to and including the noun
    captioner: CaptionerParams | None  # null: template

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, template: str) -> str:
        if template.count("{class}") != 1 or place(template.replace("{class}", "noun"), "noun") is None:
            raise ValueError("it must contain {class} once, as a separate word")
        return template


@dataclass(frozen=True)
class Caption:
    """Text, and the characters `start` to `end` of its class noun."""

    text: str
    start: int
    end: int
    origin: str


def place(text: str, noun: str) -> tuple[int, int] | None:
    """Return (start, end) of the first `noun` in `text` as whole words, or None, as `model.prompt.noun_ends` does."""
    found = re.search(rf"(?<!\w){re.escape(noun)}(?!\w)", text, re.IGNORECASE)
    return found.span() if found else None


def caption(noun: str, params: CaptionParams, text: str | None = None, origin: str = "shipped") -> Caption:
    """Return the caption of a photo of a `noun`: `text`, in lower case and repaired if needed, or the template's."""
    text = unicodedata.normalize("NFC", " ".join((text or "").lower().split()))  # as class nouns are
    plain = template(noun, params)
    if not text:
        text, origin = plain, "template"
    if place(text, noun) is None and " " in noun:
        last = noun.split()[-1]
        if (found := place(text, last)) is not None:
            text = f"{text[: found[0]]}{noun}{text[found[1] :]}"
    found = place(text, noun)
    if found is None or len(text[: found[1]].split()) > params.max_words:
        text = f"{plain}, {text}"
        found = place(text, noun)
    assert found is not None, "the template contains the noun"
    return Caption(text, *found, origin)


def template(noun: str, params: CaptionParams) -> str:
    """Return the template with the class noun inserted."""
    return params.template.replace("{class}", noun)
