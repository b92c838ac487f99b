"""Portraits of people who agreed to it: the folder layout with `consent.csv` (columns person, basis, date) at the root.

`<root>/<noun>/<person>/*.jpg`, and one row per person: the folder's name, on what the use of the photos is based (a
signed form, a contract, yourself), and since when, as 2026-01-31. Photos of a person without a row, and of minors, are
refused: face photos are biometric data.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date

from pipelines.photos.listings import csv_rows
from pipelines.photos.roots import Root, SourceParams
from pipelines.sources.base import Prompt, Subject
from pipelines.sources.folder import Folder
from runtime.errors import UserError

CONSENT = "consent.csv"
MINORS = frozenset({"baby", "boy", "child", "girl", "infant", "kid", "teenager", "toddler"})


class Portraits:
    """Reader of the portraits layout.

    Raises:
        UserError: as `Folder`; `consent.csv` is missing or malformed, lacks a person, or the noun names a minor.
    """

    def __init__(self, params: SourceParams) -> None:
        self._root = Root(params.root)
        self._folder = Folder(params)

    def subjects(self) -> Iterator[Subject]:
        """Yield one subject per person; nothing before every row of `consent.csv` has been checked."""
        agreed = self._agreed()
        for subject in self._folder.subjects():
            person = subject.subject_id.rpartition("/")[2]
            if subject.class_name in MINORS:
                raise UserError(
                    f"'{subject.subject_id}' has the class noun {subject.class_name}; layout portraits takes no minors"
                )
            if person not in agreed:
                file = self._root.name(CONSENT)
                raise UserError(f"{file} has no row for '{person}'; add one, or remove the folder {person}")
            yield subject

    def prompts(self) -> Iterator[Prompt]:
        """Yield nothing: this layout has no prompts."""
        return iter(())

    def _agreed(self) -> set[str]:
        """The people with a complete row."""
        file = self._root.name(CONSENT)
        if not self._root.exists(CONSENT):
            raise UserError(f"{file} is missing; list every person there, columns person, basis, date")
        found = set()
        for line, (person, basis, day) in csv_rows(self._root, CONSENT, ("person", "basis", "date")):
            if not person.strip() or not basis.strip():
                raise UserError(
                    f"{file} line {line} has no {'basis' if person.strip() else 'person'}; complete the row"
                )
            try:
                date.fromisoformat(day.strip())
            except ValueError:
                raise UserError(f"{file} line {line} has the date '{day}'; write it as 2026-01-31") from None
            found.add(person.strip())
        return found
