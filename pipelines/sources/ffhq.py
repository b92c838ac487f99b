"""FFHQ (Flickr-Faces-HQ): `images1024x1024/00000/00000.png` and `ffhq-dataset-v2.json`, one photo per person.

The thumbnails' tree (`thumbnails128x128`) has the same layout and is read where the large images are missing. The
listing's `category` splits the photos: a source with split train reads `training`, one with split test `validation`.
It also has each photo's licence and author. A photo that is listed and missing is a reject; one that is not listed is
refused, as its licence is unknown.

The listing says nothing about the people. `ffhq_aging_labels.csv` of FFHQ-Aging (columns image_number, age_group,
gender), if the file is there, makes adults man and woman; everyone else is a person.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pipelines.photos.licences import attribution, normalised
from pipelines.photos.listings import csv_rows
from pipelines.photos.roots import Root, SourceParams, is_hidden
from pipelines.sources.base import Photo, Prompt, Subject, is_image, read_captions
from runtime.errors import UserError

LISTING = "ffhq-dataset-v2.json"
FOLDERS = ("images1024x1024", "thumbnails128x128")
CATEGORIES = {"train": "training", "test": "validation"}
LABELS = "ffhq_aging_labels.csv"
NOUN = "person"
NOUNS = {"male": "man", "female": "woman"}
ADULTS = frozenset({"20-29", "30-39", "40-49", "50-69", "70-120"})
"""Age groups of FFHQ-Aging; the next younger is 15-19."""


@dataclass(frozen=True)
class Listed:
    """What the listing says of a photo."""

    category: str
    licence: str | None
    attribution: str | None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Listed:
        """Read an entry of the listing; one without `metadata` names no licence."""
        photo = row.get("metadata", {})
        licence = normalised(photo.get("license_url")) or normalised(photo.get("license"))
        return cls(row["category"], licence, attribution(photo.get("author"), photo.get("photo_url")))


class FFHQ:
    """Reader of the FFHQ layout.

    Raises:
        UserError: the listing or the photos are missing, the listing is no JSON of that form, a photo is not listed, or
            the labels are malformed.
    """

    def __init__(self, params: SourceParams) -> None:
        self._params = params
        self._root = Root(params.root)

    def subjects(self) -> Iterator[Subject]:
        """Yield one subject per listed photo of the split, in the listing's order of numbers."""
        folder = next((name for name in FOLDERS if self._root.exists(name)), None)
        if folder is None:
            raise UserError(f"'{self._root.url}' has no folder {FOLDERS[0]}; put the photos there")
        listed, captions = self._listing(), read_captions(self._root)
        files, nouns = dict(self._files(folder)), self._nouns()
        for stem, path in files.items():
            if stem not in listed:
                raise UserError(f"photo '{self._root.name(path)}' is not in {LISTING}; remove it")
        for stem, row in sorted(listed.items()):
            if row.category == CATEGORIES[self._params.split]:
                subject_id = f"{self._params.name}/{stem}"
                path = files.get(stem, f"{folder}/{stem[:2]}000/{stem}.png")
                missing = stem not in files
                photo = Photo(
                    f"{subject_id}/0",
                    path,
                    caption=captions.get(path),
                    reject="missing_file" if missing else None,
                    reject_detail=f"named in {LISTING}" if missing else "",
                    licence=row.licence,
                    attribution=row.attribution,
                )
                noun = nouns.get(stem, NOUN)
                yield Subject(subject_id, self._params.name, noun, self._params.split, (photo,))

    def prompts(self) -> Iterator[Prompt]:
        """Yield nothing: this layout has no prompts."""
        return iter(())

    def _files(self, folder: str) -> Iterator[tuple[str, str]]:
        """(stem, path) of the photos: in folders of a thousand, or all in one."""
        for inside in ("", *sorted(self._root.folders(folder))):
            place = f"{folder}/{inside}" if inside else folder
            for name in sorted(self._root.files(place)):
                if is_image(name) and not is_hidden(name):
                    yield PurePosixPath(name).stem, f"{place}/{name}"

    def _nouns(self) -> dict[str, str]:
        """{stem: noun} of the adults in the labels."""
        found = {}
        if self._root.exists(LABELS):
            for line, (number, age, gender) in csv_rows(self._root, LABELS, ("image_number", "age_group", "gender")):
                if not number.strip().isdecimal() or gender.strip() not in NOUNS:
                    where = f"{self._root.name(LABELS)} line {line}"
                    raise UserError(
                        f"{where} has number '{number}' and gender '{gender}'; replace it with the published file"
                    )
                if age.strip() in ADULTS:
                    found[f"{int(number):05d}"] = NOUNS[gender.strip()]
        return found

    def _listing(self) -> dict[str, Listed]:
        """The listing by stem."""
        file = self._root.name(LISTING)
        if not self._root.exists(LISTING):
            raise UserError(f"{file} is missing; it has the photos' split, authors and licences")
        try:
            rows: Any = json.loads("".join(self._root.lines(LISTING)))
            found = {f"{int(number):05d}": Listed.of(row) for number, row in rows.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{file} is not FFHQ's listing ({error!r}); replace it with the published file") from None
        for stem, row in found.items():
            if row.category not in CATEGORIES.values():
                raise UserError(
                    f"{file} has category '{row.category}' for photo {stem}; replace it with the published file"
                )
        return found
