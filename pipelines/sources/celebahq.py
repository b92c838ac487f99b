"""CelebAMask-HQ: `CelebA-HQ-img/<n>.jpg`, with the people's identities where CelebA's makers have given them out.

`CelebA-HQ-to-CelebA-mapping.txt` (idx, orig_idx, orig_file) leads to the lines `<file> <identity>` of
`identity_CelebA.txt`, which is sent on request: with both, the photos of one person are one subject; without, each
photo is a subject of its own. `list_attr_celeba.txt`'s column Male, if the file is there, chooses between man and
woman.

The part masks (`CelebAMask-HQ-mask-anno`) are not read: they are of half the size; Grounded SAM with `mask.phrase` set
to `head` cuts out the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath

from pipelines.photos.licences import CELEBA
from pipelines.photos.roots import Root, SourceParams, is_hidden
from pipelines.sources.base import Photo, Prompt, Subject, is_image, not_an_image, read_captions
from runtime.errors import UserError

FOLDER = "CelebA-HQ-img"
MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
IDENTITIES = "identity_CelebA.txt"
ATTRIBUTES_FILE = "list_attr_celeba.txt"
NOUN = "person"


class CelebAHQ:
    """Reader of the CelebAMask-HQ layout.

    Raises:
        UserError: the photos are missing, a listing is malformed, or a photo is missing from one.
    """

    def __init__(self, params: SourceParams) -> None:
        self._params = params
        self._root = Root(params.root)

    def subjects(self) -> Iterator[Subject]:
        """Yield one subject per person, sorted; `p<identity>`, or the photo's number without identities."""
        if not self._root.exists(FOLDER):
            raise UserError(f"'{self._root.url}' has no folder {FOLDER}; put the photos there")
        captions = read_captions(self._root)
        original = self._original()
        identity = self._pairs(IDENTITIES) if self._root.exists(IDENTITIES) else {}
        male = self._male() if self._root.exists(ATTRIBUTES_FILE) else {}
        people: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name in self._root.files(FOLDER):
            if is_hidden(name):
                continue
            stem = PurePosixPath(name).stem
            person = f"p{self._of(identity, original, stem, IDENTITIES)}" if identity else stem
            people[person].append((stem, name))
        for person, photos in sorted(people.items()):
            stems = [stem for stem, name in photos if is_image(name)]
            nouns = {self._of(male, original, stem, ATTRIBUTES_FILE) for stem in stems} if male else set()
            noun = {"1": "man", "-1": "woman"}.get(next(iter(nouns)), NOUN) if len(nouns) == 1 else NOUN
            yield self._subject(person, noun, photos, captions)

    def prompts(self) -> Iterator[Prompt]:
        """Yield nothing: this layout has no prompts."""
        return iter(())

    def _subject(self, person: str, noun: str, photos: list[tuple[str, str]], captions: dict[str, str]) -> Subject:
        subject_id, found = f"{self._params.name}/{person}", []
        for stem, name in sorted(photos):
            frame_id, path = f"{subject_id}/{stem}", f"{FOLDER}/{name}"
            found.append(
                Photo(frame_id, path, caption=captions.get(path), licence=CELEBA)
                if is_image(name)
                else not_an_image(frame_id, path)
            )
        return Subject(subject_id, self._params.name, noun, self._params.split, tuple(found))

    def _of(self, table: dict[str, str], original: dict[str, str], stem: str, file: str) -> str:
        """The value of a photo in a listing of CelebA's own file names."""
        if stem not in original:
            raise UserError(f"{self._root.name(MAPPING)} has no row for photo {stem}; use the published file")
        if original[stem] not in table:
            raise UserError(f"{self._root.name(file)} has no row for {original[stem]}; use the published file")
        return table[original[stem]]

    def _original(self) -> dict[str, str]:
        """{number of a photo: CelebA's file name}; empty without the mapping."""
        if not self._root.exists(MAPPING):
            needed = next((name for name in (IDENTITIES, ATTRIBUTES_FILE) if self._root.exists(name)), None)
            if needed:
                raise UserError(f"{self._root.name(MAPPING)} is missing; {needed} cannot be read without it")
            return {}
        rows = [line.split() for line in self._root.lines(MAPPING)]
        found = {}
        for number, row in enumerate(rows, 1):
            if row and row[0] != "idx":
                if len(row) != 3:
                    raise UserError(
                        f"{self._root.name(MAPPING)} line {number} is not 'idx orig_idx orig_file'; replace it"
                    )
                found[row[0]] = row[2]
        return found

    def _pairs(self, file: str) -> dict[str, str]:
        found = {}
        for number, line in enumerate(self._root.lines(file), 1):
            row = line.split()
            if row and len(row) != 2:
                raise UserError(f"{self._root.name(file)} line {number} is not '<file> <identity>'; replace it")
            if row:
                found[row[0]] = row[1]
        return found

    def _male(self) -> dict[str, str]:
        """{CelebA's file name: 1 or -1}."""
        lines = iter(self._root.lines(ATTRIBUTES_FILE))
        next(lines, "")  # the number of photos
        header = next(lines, "").split()
        if "Male" not in header:
            raise UserError(f"{self._root.name(ATTRIBUTES_FILE)} line 2 has no column Male; use the published file")
        at = header.index("Male") + 1
        rows = (line.split() for line in lines)
        return {row[0]: row[at] for row in rows if len(row) == len(header) + 1}
