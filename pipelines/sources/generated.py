"""Pictures that stage selfaugment made: `images/<person>/*.png`, `pictures.csv` (columns path, noun, split, role) and
`captions.csv`.

A photo is a reference or a target, as its row says; no caption holds a name. Held-out people are in a root of their
own, and a source whose split is another than that of the rows is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import PurePosixPath
from typing import NamedTuple

from pipelines.photos.listings import csv_rows
from pipelines.photos.roots import Root, SourceParams, is_hidden
from pipelines.sources.base import Photo, Prompt, Role, Subject, class_noun, read_captions
from runtime.errors import UserError

LISTING = "pictures.csv"
IMAGES = "images"
COLUMNS = ("path", "noun", "split", "role")
ROLES: dict[str, Role] = {"reference": "reference", "target": "target"}


class ListedPicture(NamedTuple):
    """A row of the listing."""

    person: str
    stem: str
    path: str
    noun: str
    role: Role


class Generated:
    """Reader of the generated layout.

    Raises:
        UserError: the listing is missing or malformed, of another split, or does not list a picture that is there.
    """

    def __init__(self, params: SourceParams) -> None:
        self._params = params
        self._root = Root(params.root)

    def subjects(self) -> Iterator[Subject]:
        """Yield one subject per person."""
        captions = read_captions(self._root)
        listed = sorted(self._listing(), key=lambda row: (row.person, row.stem))
        paths = {row.path for row in listed}
        for person in (name for name in self._root.folders(IMAGES) if not is_hidden(name)):
            for file in self._root.files(f"{IMAGES}/{person}"):
                path = f"{IMAGES}/{person}/{file}"
                if not is_hidden(file) and path not in paths:
                    raise UserError(f"photo '{self._root.name(path)}' is not in {LISTING}; remove it")
        for person, rows in groupby(listed, key=lambda row: row.person):
            subject_id, of_person = f"{self._params.name}/{person}", list(rows)
            photos = tuple(
                Photo(
                    f"{subject_id}/{row.stem}",
                    row.path,
                    caption=captions.get(row.path),
                    role=row.role,
                    reject=None if self._root.exists(row.path) else "missing_file",
                    reject_detail="" if self._root.exists(row.path) else f"named in {LISTING}",
                )
                for row in of_person
            )
            yield Subject(subject_id, self._params.name, of_person[0].noun, self._params.split, photos)

    def prompts(self) -> Iterator[Prompt]:
        """Yield nothing: this layout has no prompts."""
        return iter(())

    def _listing(self) -> Iterator[ListedPicture]:
        """The rows of the listing, checked."""
        file, nouns = self._root.name(LISTING), dict[str, str]()
        if not self._root.exists(LISTING):
            raise UserError(
                f"{file} is missing; give the folder train or test that stage selfaugment wrote as the root"
            )
        for line, (path, noun, split, role) in csv_rows(self._root, LISTING, COLUMNS):
            parts, where = PurePosixPath(path).parts, f"{file} line {line}"
            if len(parts) != 3 or parts[0] != IMAGES:
                raise UserError(f"{where} has the path '{path}'; write {IMAGES}/<person>/<picture>.png")
            if role not in ROLES:
                raise UserError(f"{where} has the role '{role}'; write reference or target")
            if split != self._params.split:
                raise UserError(
                    f"{where} is of split {split}, but source '{self._params.name}' has split {self._params.split};"
                    " held-out people are never trained on, so correct the source"
                )
            if nouns.setdefault(parts[1], class_noun(noun)) != class_noun(noun):
                raise UserError(f"{where} calls '{parts[1]}' {noun}, and {nouns[parts[1]]} before; keep one noun")
            yield ListedPicture(parts[1], PurePosixPath(path).stem, path, class_noun(noun), ROLES[role])
