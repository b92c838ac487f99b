"""DreamBench: `dataset/<subject>/NN.jpg` and `dataset/prompts_and_classes.txt` (repository google/dreambooth).

The text file has a `Classes` block of `subject,class` lines and a `Prompts` block with up to two Python lists: object
prompts and live-subject prompts. A subject whose class is in `LIVE_CLASSES` gets the live list if the file has one,
every other subject the object list; that is the published split (21 objects, 9 live subjects).

`{0}` (the unique token) is dropped and `{1}` (the class) becomes `{class}`: this method puts its pseudo-word after the
class noun.

The published prompts have no groups. A comment of one lower-case word after a prompt (`..., # shape`) names its group;
without one `prompt_group` decides.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipelines.photos.roots import Root, SourceParams, is_hidden
from pipelines.sources.base import (
    Photo,
    Prompt,
    Subject,
    caption_key,
    class_noun,
    is_image,
    named_frames,
    not_an_image,
    read_captions,
    refuse_deeper,
    refuse_loose,
)
from runtime.errors import UserError

# The file does not mark live subjects. Of the published classes these are the animals; the toybox has a duck.
LIVE_CLASSES = frozenset({"cat", "dog", "duck"})
FOLDER = "dataset"
LISTING = f"{FOLDER}/prompts_and_classes.txt"

# (group, pattern of its prompts), tried in this order on the lower-case template.
_GROUPS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("style", re.compile(r"\bstyle\b|\b(painting|sketch|drawing|watercolou?r|cartoon|neon|pixel art|mosaic|statue)\b")),
    ("style", re.compile(r"\bblack and white\b|\bphoto effect\b")),
    ("accessory", re.compile(r"\b(wearing|outfit|hat|scarf|glasses|crown|shirt|monocle)\b")),
    ("shape", re.compile(r"\bshaped\b|\bin the shape of\b")),
    ("scene", re.compile(r"\{class\} \w")),
    ("property", re.compile(r"\w \{class\}")),
)
_PLAIN = re.compile(r"(an?|the|(a|the) (photo|picture|image) of (an?|the)) \{class\}")

_PROMPT = re.compile(
    r"""(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s*(?:\.format\([^)]*\))?\s*,?\s*\]?\s*(?:\#\s*(?P<comment>.*))?$"""
)
_GROUP_WORD = re.compile(r"[a-z][a-z_]*")


@dataclass(frozen=True)
class Template:
    """A prompt with `{class}`, and its group."""

    text: str
    group: str


@dataclass
class Listing:
    """The content of `prompts_and_classes.txt`."""

    classes: dict[str, str] = field(default_factory=dict)
    objects: list[Template] = field(default_factory=list)
    live: list[Template] = field(default_factory=list)

    def prompts_of(self, class_name: str) -> list[Template]:
        """Return the prompts for a subject of that class."""
        return self.live if self.live and class_name in LIVE_CLASSES else self.objects


class DreamBench:
    """Reader of the DreamBench layout.

    Raises:
        UserError: the root or the text file is missing or malformed, or file and folders list different subjects.
    """

    def __init__(self, params: SourceParams) -> None:
        self._params = params
        self._root = Root(params.root)

    def subjects(self) -> Iterator[Subject]:
        """Yield one subject per folder."""
        classes = self._listing().classes
        captions = read_captions(self._root)
        folders = [name for name in self._root.folders(FOLDER) if not is_hidden(name)]
        self._check_same(classes, folders)
        refuse_loose(self._root, FOLDER, f"{FOLDER}/<subject>/")
        self._root.report_archives(FOLDER)
        for subject in sorted(classes):
            photos = tuple(self._photos(subject, captions))
            yield Subject(self._id(subject), self._params.name, classes[subject], self._params.split, photos)

    def prompts(self) -> Iterator[Prompt]:
        """Yield the prompts of every subject, numbered from 0 in the order of its list."""
        listing = self._listing()
        for subject, class_name in sorted(listing.classes.items()):
            for number, template in enumerate(listing.prompts_of(class_name)):
                yield Prompt(self._id(subject), class_name, number, template.text, template.group)

    def _photos(self, subject: str, captions: dict[str, str]) -> Iterator[Photo]:
        folder = f"{FOLDER}/{subject}"
        refuse_deeper(self._root, folder, f"{FOLDER}/<subject>/")
        for last, file in named_frames(self._root.files(folder)).items():
            frame_id, path = f"{self._id(subject)}/{last}", f"{folder}/{file}"
            yield (
                Photo(frame_id, path, caption=captions.get(caption_key(path)))
                if is_image(file)
                else not_an_image(frame_id, path)
            )

    def _id(self, subject: str) -> str:
        return f"{self._params.name}/{subject}"

    def _listing(self) -> Listing:
        if not self._root.exists(LISTING):
            raise UserError(f"{self._root.name(LISTING)} is missing; the root must be the folder above '{FOLDER}/'")
        return parse_listing(self._root.lines(LISTING), self._root.name(LISTING))

    def _check_same(self, classes: dict[str, str], folders: list[str]) -> None:
        file = self._root.name(LISTING)
        for subject in folders:
            if subject not in classes:
                raise UserError(f"{file} gives no class for folder '{subject}'; add the line '{subject},<class>'")
        for subject in classes:
            if subject not in folders:
                raise UserError(f"{file} lists '{subject}', which has no folder beside it; add it or remove the line")


def parse_listing(lines: Iterable[str], file: str) -> Listing:
    """Return the content of `prompts_and_classes.txt`; `file` names it in errors.

    Raises:
        UserError: a line belongs to no block, a prompt has no class placeholder, or classes or prompts are missing.
    """
    listing = Listing()
    block = ""
    for number, raw in enumerate(lines, start=1):
        line = raw.strip()
        if line.lower() in ("classes", "prompts", "object prompts", "live subject prompts"):
            block = line.lower()
        elif not line or line == "]" or line.startswith("#") or re.fullmatch(r"\w+\s*=\s*\[", line):
            continue
        elif block == "classes":
            _add_class(listing.classes, line, f"{file} line {number}")
        elif block == "object prompts":
            listing.objects.append(_template(line, f"{file} line {number}"))
        elif block == "live subject prompts":
            listing.live.append(_template(line, f"{file} line {number}"))
        else:
            raise UserError(f"{file} line {number} is '{line}', which belongs to no block of the format; remove it")
    for what, found in (("class", listing.classes), ("object prompt", listing.objects)):
        if not found:
            raise UserError(f"{file} holds no {what}; compare it with the published file of google/dreambooth")
    return listing


def prompt_group(template: str) -> str:
    """Return the group of a prompt with `{class}`: style, accessory, shape, scene, property or plain.

    Style, accessory and shape are found by keywords; otherwise, words after the class noun make a scene, an adjective
    before it a property (red, shiny, wet), and neither a plain prompt.
    """
    text = template.lower()
    if _PLAIN.fullmatch(text):
        return "plain"
    return next((group for group, pattern in _GROUPS if pattern.search(text)), "plain")


def _add_class(classes: dict[str, str], line: str, where: str) -> None:
    subject, _, raw = (part.strip() for part in line.partition(","))
    if (subject, raw) == ("subject_name", "class"):
        return
    if not subject or not class_noun(raw) or "," in raw or "/" in subject:
        raise UserError(f"{where} is '{line}'; write '<subject folder>,<class>'")
    if subject in classes:
        raise UserError(f"{where} lists '{subject}' again; remove one of the lines")
    classes[subject] = class_noun(raw)


def _template(line: str, where: str) -> Template:
    found = _PROMPT.match(line)
    if found is None:
        raise UserError(f"{where} is '{line}', not a prompt like 'a {{0}} {{1}} in the snow'; quote it as in Python")
    text = ast.literal_eval(found["text"]).replace("{1}", "{class}").replace("{0}", " ")
    text = " ".join(text.split())
    if text.count("{class}") != 1 or re.search(r"[{}]", text.replace("{class}", "")):
        raise UserError(
            f"{where}: prompt {found['text']} must contain {{1}}, the class, once, and no braces but {{0}}; fix it"
        )
    comment = (found["comment"] or "").strip()
    return Template(text, comment if _GROUP_WORD.fullmatch(comment) else prompt_group(text))
