"""Whom to make pictures of, and which: people from the file of names, prompts from the params."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipelines.engine.items import Item
from pipelines.photos.listings import csv_rows
from pipelines.photos.roots import Root
from pipelines.sources.base import Role, class_noun
from pipelines.sources.portraits import MINORS
from runtime.digest import digest
from runtime.errors import UserError
from runtime.params import Section

PLAIN, STYLE = "plain", "style"
"""Groups of prompts with a rule of their own: references, and edits that change the face itself."""
GROUPS = ("job", "clothes", "scene", STYLE, "accessory", "hair")
"""Of edits."""
NAME = "{name}"


class EditParams(Section):
    """Prompts of edited pictures by group; {name} stands for the person."""

    job: tuple[str, ...]
    clothes: tuple[str, ...]
    scene: tuple[str, ...]
    style: tuple[str, ...]
    accessory: tuple[str, ...]
    hair: tuple[str, ...]


class SelfAugmentParams(Section):
    """Which pictures are made, and which of them are kept."""

    names: str | None  # CSV file of people, columns name and noun; null: nothing is made
    seeds: int = Field(ge=2)  # plain pictures of a name that are compared
    agreement: float  # mean cosine of their faces from which the name is known
    plain: str  # prompt of the plain pictures, the references; {name} stands for the person
    plain_images: int = Field(ge=1)  # of the compared ones
    edits: EditParams  # prompts of the targets
    edit_images: int = Field(ge=1)  # of each
    phrase: str  # prompt of the detector; {class} is the class noun
    min_detection: float  # score from which a box is a face, 0..1
    second_face: float  # score from which a box elsewhere is another face, 0..1
    margin: float = Field(ge=0)  # around the box of a face, fraction of its longer side
    min_cosine: float  # to the mean plain face
    min_cosine_style: float  # the same in group style
    clip_t_quantile: float = Field(ge=0, lt=1)  # of a prompt's pictures; those with a lower CLIP-T are rejected
    hold_out: int = Field(ge=0)  # one name in so many is for evaluation; 0: none
    steps: int = Field(ge=1)
    guidance_scale: float
    seed: int
    batch_size: int = Field(ge=1)
    dtype: Literal["float32", "float16", "bfloat16"]
    shard_names: int = Field(ge=1)

    @field_validator("plain", "edits")
    @classmethod
    def _has_a_name(cls, given: str | EditParams) -> str | EditParams:
        for prompt in [given] if isinstance(given, str) else [p for group in GROUPS for p in getattr(given, group)]:
            if prompt.count(NAME) != 1:
                raise ValueError(f"prompt '{prompt}' must contain {NAME} once")
        return given

    @model_validator(mode="after")
    def _plain_ones_are_compared(self) -> SelfAugmentParams:
        if self.plain_images > self.seeds:
            raise ValueError(f"plain_images is {self.plain_images}, but only {self.seeds} (seeds) are made")
        return self


NOT_OF_A_PICTURE = frozenset({"names", "second_face", "min_cosine", "min_cosine_style", "clip_t_quantile", "hold_out"})
"""Params that decide what is kept, not what is made or measured."""


@dataclass(frozen=True)
class NamedPerson:
    """A row of the file of names."""

    name: str
    noun: str

    @property
    def id(self) -> str:
        """What stands for the person in paths and tables: a name in these would be one more place to forget it in."""
        return digest(self.name)[:12]

    def split(self, params: SelfAugmentParams) -> str:
        """Return train, or test for one name in `hold_out`, whatever other names there are."""
        held_out = params.hold_out > 0 and int(digest("hold out", params.seed, self.name), 16) % params.hold_out == 0
        return "test" if held_out else "train"


def read_people(file: str) -> list[NamedPerson]:
    """Return the people in a CSV file with columns name and noun.

    Raises:
        UserError: the file is missing or malformed, a cell is empty, a name is there twice, or a noun is of minors.
    """
    place = Path(file).expanduser().absolute()
    if not place.is_file():
        raise UserError(f"selfaugment.names: {file} does not exist; write a CSV file with columns name and noun")
    found: dict[str, NamedPerson] = {}
    for line, (raw, noun) in csv_rows(Root(str(place.parent)), place.name, ("name", "noun")):
        person = NamedPerson(" ".join(raw.split()), class_noun(noun))
        if not person.name or not person.noun:
            raise UserError(f"{file} line {line} has no {'noun' if person.name else 'name'}; complete the row")
        if person.noun in MINORS:
            raise UserError(f"{file} line {line} has the noun {person.noun}; no pictures of minors are made")
        if found.setdefault(person.name.lower(), person) is not person:
            raise UserError(f"{file} line {line} repeats the name '{person.name}'; remove one of the rows")
    if not found:
        raise UserError(f"{file} has no names; write rows of name and noun, such as 'Ada Byron,woman'")
    return list(found.values())


def caption(prompt: str, person: NamedPerson) -> str:
    """Return a prompt with the class noun, which S* replaces, where the name stands.

    Raises:
        UserError: the prompt holds the name besides.
    """
    article = "an" if person.noun[0] in "aeiou" else "a"
    text = prompt.replace(NAME, f"{article} {person.noun}")
    if re.search(rf"(?<!\w){re.escape(person.name)}(?!\w)", text, re.IGNORECASE):
        raise UserError(
            f"selfaugment: the name '{person.name}' is in the caption '{text}'; change the prompt or remove the name"
        )
    return text


def pictures(person: NamedPerson, params: SelfAugmentParams) -> Iterator[dict[str, object]]:
    """Yield the pictures to make of a person, those that account for the name: the columns known before."""
    wanted = [(PLAIN, f"{PLAIN}-00", params.plain, params.plain_images)]
    for group in GROUPS:
        for number, prompt in enumerate(getattr(params.edits, group)):
            wanted.append((group, f"{group}-{number:02d}", prompt, params.edit_images))
    for group, label, prompt, count in wanted:
        role: Role = "reference" if group == PLAIN else "target"
        for index in range(count):
            yield {
                "frame_id": f"{person.id}/{label}-{index}",
                "person": person.id,
                "class_name": person.noun,
                "group": group,
                "role": role,
                "prompt": prompt,
                "caption": caption(prompt, person),
                "seed": seed(person, prompt, index, params),
            }


def seed(person: NamedPerson, prompt: str, index: int, params: SelfAugmentParams) -> int:
    """Return the seed of a picture's noise, 0..2^32 - 1, which depends on nothing else that is made."""
    return int(digest(params.seed, person.name, prompt, index), 16) % 2**32


def item(person: NamedPerson, params: SelfAugmentParams) -> Item:
    """Return the item of a person; each row of its payload has the name as well."""
    rows = list(pictures(person, params))
    payload = [row | {"name": person.name} for row in rows]
    return Item(person.id, digest(payload), tuple(str(row["frame_id"]) for row in rows), payload)
