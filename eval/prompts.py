"""The prompts of our own, `prompts.yaml`: four groups by class of subject, and prompts for two subjects."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from params import Section, UserError

FILE = Path(__file__).with_name("prompts.yaml")
LIST_IDS = 100
"""Ids set aside for each list of the file."""


class PromptFile(Section):
    """The file's content; what it means stands in it."""

    live: frozenset[str]
    groups: dict[str, dict[Literal["any", "live", "object"], tuple[str, ...]]]
    pairs: tuple[str, ...]


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
