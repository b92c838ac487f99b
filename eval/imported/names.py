"""What the names of images made elsewhere mean: a held-out subject, one of its prompts, a seed."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from eval.protocol import protocol

MOST_SEED = 2**63 - 1
"""What the seed column holds."""


class Misnamed(Exception):
    """A name means nothing here; the message continues `'<file>' ...`."""


@dataclass(frozen=True)
class ListedPrompt:
    """A prompt of a subject, as in the generations table; `wanted`: whether the protocol in params.yaml chooses it."""

    prompt_id: int
    group: str
    text: str
    wanted: bool


@dataclass(frozen=True)
class Names:
    """The held-out subjects, and what may be asked of each.

    Attributes:
        subjects: by subject_id.
        prompts: by subject_id, in the order of their list; the reconstruction prompt last.
        dropped: ids of subjects with no photo to compare with: dropped by curate, or without a usable mask.
        token: word that stands for the subject in prompts made elsewhere and is left out of them; may be empty.
    """

    subjects: Mapping[str, protocol.HeldOutSubject]
    prompts: Mapping[str, Sequence[ListedPrompt]]
    dropped: Collection[str] = ()
    token: str = ""

    def subject(self, name: str) -> str:
        """Return the id of the subject of that name: its id, or the last part of it.

        Raises:
            Misnamed: there is no such subject, or there are several.
        """
        found = matching(name, [*self.subjects, *self.dropped])
        if len(found) == 1:
            return found[0]
        if found:
            raise Misnamed(f"is of '{name}', which may be {' or '.join(found)}")
        last = {subject_id: PurePosixPath(subject_id).name for subject_id in self.subjects}
        raise Misnamed(f"is of '{name}', which is no held-out subject{hint(name, last.values())}")

    def prompt(self, subject_id: str, written: str) -> ListedPrompt:
        """Return the prompt of a subject that is written as its text, in words that any characters separate, or as its
        number.

        Raises:
            Misnamed: the subject has no such prompt, or several.
        """
        listed = self.prompts[subject_id]
        if re.fullmatch("-?[0-9]+", written.strip()):
            found = [prompt for prompt in listed if prompt.prompt_id == int(written)]
            if not found:
                known = ", ".join(_ranges(sorted(prompt.prompt_id for prompt in listed)))
                asked = written.strip()[:20]
                raise Misnamed(f"asks for prompt {asked} of {subject_id}, whose prompts have the numbers {known}")
            return found[0]
        text = words(written, self.token)
        found = [prompt for prompt in listed if words(prompt.text) == text]
        if len(found) > 1:
            numbers = " and ".join(str(prompt.prompt_id) for prompt in found)
            raise Misnamed(
                f"fits the prompts {numbers} of {subject_id} alike, so that only the number tells them apart"
            )
        if not found:
            raise Misnamed(f"asks for '{written}', which is no prompt of {subject_id}{self._hint(text, listed)}")
        return found[0]

    def _hint(self, text: str, listed: Sequence[ListedPrompt]) -> str:
        parts, known = text.split(), {words(prompt.text) for prompt in listed}
        for number, part in enumerate(parts):
            if " ".join(parts[:number] + parts[number + 1 :]) in known:
                return f" (--token {part} leaves out that word)"
        return hint(text, known)


def names_in(
    subjects: Sequence[protocol.HeldOutSubject],
    prompts: Mapping[str, Sequence[dict[str, Any]]],
    params: protocol.ProtocolParams,
    usable: Collection[str],
    token: str = "",
) -> Names:
    """Return the names of subjects and prompts.

    Args:
        prompts: rows of the prompts table by subject_id.
        usable: ids of the photos that can be compared with.
    """
    by_id = {s.subject_id: s for s in subjects if any(photo.frame_id in usable for photo in s.photos)}
    listed = {}
    for subject_id, subject in by_id.items():
        rows = protocol.listed(subject, prompts.get(subject_id, []), params)
        wanted = {row["prompt_id"] for row in protocol.spread(rows, params.prompts)}
        listed[subject_id] = [
            ListedPrompt(row["prompt_id"], row["group"], protocol.prompt_of(subject, row), row["prompt_id"] in wanted)
            for row in [*rows, protocol.reconstruction(params)]
        ]
    known = {*prompts, *(subject.subject_id for subject in subjects)}
    return Names(by_id, listed, sorted(known - by_id.keys()), token)


def seed_of(written: str) -> int:
    """Return a seed, 0..MOST_SEED.

    Raises:
        Misnamed: it is none.
    """
    if not re.fullmatch("[0-9]+", written.strip()) or len(written) > 30 or int(written) > MOST_SEED:
        raise Misnamed(f"has the seed '{written[:30]}', which is no whole number from 0 to 2^63 - 1")
    return int(written)


def split_name(stem: str) -> tuple[str, str]:
    """Return the prompt and the seed of a file name without suffix, `<prompt>_<seed>`.

    Raises:
        Misnamed: it does not end in a seed.
    """
    prompt, _, seed = stem.rpartition("_")
    if not prompt or not re.fullmatch("[0-9]+", seed):
        raise Misnamed("does not end in _<seed>, a whole number")
    return prompt, seed


def matching(name: str, ids: Iterable[str]) -> list[str]:
    """Return the ids that a name means: the id itself, else those that it is the last part of."""
    name = unicodedata.normalize("NFC", name.strip().strip("/"))
    known = {unicodedata.normalize("NFC", identifier): identifier for identifier in ids}
    if name in known:
        return [known[name]]
    return [identifier for key, identifier in known.items() if PurePosixPath(key).name == name]


def words(text: str, without: str = "") -> str:
    """Return a text as words that can be compared: composed letters (NFC), lower case, single spaces between them.

    Args:
        without: a word to leave out.
    """
    found = _words(text)
    left_out = _words(without)
    size = len(left_out)
    while size and (places := [n for n in range(len(found)) if found[n : n + size] == left_out]):
        del found[places[0] : places[0] + size]
    return " ".join(found)


def hint(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean '...'?)`, or an empty string if no known name is similar."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{found[0]}'?)" if found else ""


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    """Yield ascending numbers as text, those that follow each other as one range."""
    first = last = numbers[0]
    for number in [*numbers[1:], None]:
        if number is not None and number == last + 1:
            last = number
            continue
        yield str(first) if first == last else f"{first} to {last}"
        if number is not None:
            first = last = number


def _words(text: str) -> list[str]:
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFC", text).casefold()).split()
