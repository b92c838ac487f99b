"""The prompts of our own, `prompts.yaml`: four groups by class of subject, and prompts for two subjects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import yaml

from runtime.errors import UserError
from runtime.params import Section

RECONSTRUCTION, PAIR = "reconstruction", "pair"
PHOTO = "photo"
"""Group of the real photos: made from no prompt, they stand in both the reconstruction and the editing columns."""

FILE = Path(__file__).with_name("prompts.yaml")
LIST_IDS = 100
"""Ids set aside for each list of the file."""


class PromptFile(Section):
    """The file's content; what it means stands in it."""

    live: frozenset[str]
    groups: dict[str, dict[Literal["any", "live", "object"], tuple[str, ...]]]
    pairs: tuple[str, ...]

    @pydantic.model_validator(mode="after")
    def names_are_free_and_nouns_have_their_places(self) -> Self:
        taken = sorted({RECONSTRUCTION, PAIR, PHOTO} & self.groups.keys())
        if taken:
            raise ValueError(f"group '{taken[0]}' has a name that scores use otherwise; call it something else")
        asked = [(line, {"class"}) for lists in self.groups.values() for lines in lists.values() for line in lines]
        for line, places in [*asked, *((line, {"a", "b"}) for line in self.pairs)]:
            if set(re.findall("{(.*?)}", line)) != places:
                wanted = " and ".join(f"{{{place}}}" for place in sorted(places))
                raise ValueError(f"prompt '{line}' must have {wanted} and no other place for a noun")
        return self


@cache
def prompt_file() -> PromptFile:
    """Return what the file holds.

    Raises:
        UserError: it is not YAML, or a key is unknown, missing or of another type.
    """
    try:
        return PromptFile.model_validate(yaml.safe_load(FILE.read_text(encoding="utf-8")))
    except (yaml.YAMLError, pydantic.ValidationError) as error:
        raise UserError(f"{FILE.name} is malformed ({' '.join(str(error).split())}); correct it") from None


def of_class(class_name: str) -> Iterator[dict[str, Any]]:
    """Yield the prompts for a class noun, with the columns prompt_id, group and template of the prompts table."""
    kind = "live" if class_name in prompt_file().live else "object"
    first = 0
    for group, lists in prompt_file().groups.items():
        for applies, templates in lists.items():
            if applies in ("any", kind):
                for number, template in enumerate(templates, start=first):
                    yield {"prompt_id": number, "group": group, "template": template}
            first += LIST_IDS


def of_pairs() -> list[str]:
    """Return the prompts for two subjects, with {a} and {b} where their class nouns stand."""
    return list(prompt_file().pairs)
