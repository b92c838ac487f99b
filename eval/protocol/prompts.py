"""Our own prompts, `prompts.yaml`: four groups by class of subject, six for people, and prompts for two subjects."""

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
"""Group of the real photos: they have no prompt and count in both the reconstruction and the editing columns."""

FILE = Path(__file__).with_name("prompts.yaml")
LIST_IDS = 100
"""Ids reserved for each list of the file."""
PEOPLE_ID = 5_000
"""First prompt_id of the prompts for people."""


class PromptFile(Section):
    """The file's content; comments in the file explain it."""

    live: frozenset[str]
    groups: dict[str, dict[Literal["any", "live", "object"], tuple[str, ...]]]
    people: dict[str, tuple[str, ...]]
    pairs: tuple[str, ...]

    @pydantic.model_validator(mode="after")
    def names_are_free_and_nouns_have_their_places(self) -> Self:
        taken = sorted({RECONSTRUCTION, PAIR, PHOTO} & {*self.groups, *self.people})
        if taken:
            raise ValueError(f"group '{taken[0]}' has a name that is reserved in the scores; rename it")
        asked = [(line, {"class"}) for lists in self.groups.values() for lines in lists.values() for line in lines]
        asked += [(line, {"class"}) for lines in self.people.values() for line in lines]
        for line, places in [*asked, *((line, {"a", "b"}) for line in self.pairs)]:
            if set(re.findall("{(.*?)}", line)) != places:
                wanted = " and ".join(f"{{{place}}}" for place in sorted(places))
                raise ValueError(f"prompt '{line}' must have {wanted} and no other placeholder")
        return self


@cache
def prompt_file() -> PromptFile:
    """Return the content of prompts.yaml.

    Raises:
        UserError: it is not valid YAML, or a key is unknown, missing or of the wrong type.
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


def of_people() -> Iterator[dict[str, Any]]:
    """Yield the prompts for people, with the columns of `of_class`."""
    for place, (group, templates) in enumerate(prompt_file().people.items()):
        for number, template in enumerate(templates, start=PEOPLE_ID + LIST_IDS * place):
            yield {"prompt_id": number, "group": group, "template": template}


def of_pairs() -> list[str]:
    """Return the prompts for two subjects, with {a} and {b} in place of their class nouns."""
    return list(prompt_file().pairs)
