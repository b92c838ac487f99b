"""What a format of an export is: how a shard of pairs is written, and what is written once all are."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipelines.export import render
from pipelines.export.options import ExportOptions
from pipelines.export.plan import Part
from pipelines.export.render import PairImage
from runtime.errors import UserError


@dataclass(frozen=True)
class EncodedPair:
    """A pair, ready to be written.

    Attributes:
        number: in its split.
        record: the columns of `records.schema`.
        captions: by role, of the photos.
        files: by role (target, reference, positive; with masks target_mask and so on), suffix and bytes of its file.
    """

    number: int
    record: dict[str, Any]
    captions: dict[str, str]
    files: dict[str, tuple[str, bytes]]

    @property
    def key(self) -> str:
        """The number with leading zeros, the stem of the pair's files."""
        return f"{self.number:08d}"


class Format(ABC):
    """A format. Its methods hold no state: they run in any process and depend on their arguments alone."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """What the format is, for the command's help."""
    note: ClassVar[str] = ""
    """What the card adds to the meaning of the columns."""

    def check(self, options: ExportOptions) -> None:  # noqa: B027  # most formats take every option
        """Refuse options that the format's reader cannot use.

        Raises:
            UserError: names the option and what to give instead.
        """

    def encode(self, images: Mapping[str, PairImage], options: ExportOptions) -> dict[str, tuple[str, bytes]]:
        """Return the files of a pair by role; called by threads."""
        files = {role: render.encoded(image.image, options) for role, image in images.items()}
        if "mask" in options.fields:
            files |= {f"{role}_mask": render.encoded_mask(image.mask) for role, image in images.items()}
        return files

    @abstractmethod
    def write(self, part: Part, pairs: Iterable[EncodedPair], folder: Path, options: ExportOptions) -> Iterator[str]:
        """Write the files of a shard below `folder`, which stands for the export's; yield the line of each pair in the
        format's index, in order (empty if it has none). A shard is on disk once the generator is exhausted.
        """

    @abstractmethod
    def holder(self, split: str, index: int, number: int, options: ExportOptions) -> str:
        """Return the file that holds a pair's target, relative to the export, by its shard and number."""

    def index(
        self, split: str, entries: Iterator[str], options: ExportOptions
    ) -> Iterator[tuple[str, Iterable[bytes]]]:
        """Yield name and content of the files that list the pairs of a split, from the lines of `write`."""
        return iter(())

    def settings(self, splits: Iterable[str], options: ExportOptions) -> Iterator[tuple[str, str]]:
        """Yield name and text of further files, such as the trainer's own configuration."""
        return iter(())

    def data_files(self, split: str) -> str | None:
        """Return the pattern of a split's files that the datasets library reads, for the card; None: it cannot."""
        return None

    @abstractmethod
    def reads(self, splits: Iterable[str], options: ExportOptions) -> str:
        """Return the command or code that reads the export in its folder, for the card."""


FOLDERS = {"target": "targets", "reference": "references", "positive": "positives", "target_mask": "masks"}
"""Of the images of a role, where a trainer finds those of a pair by their common name in parallel folders."""


def write_parallel(pair: EncodedPair, folder: Path, stem: str) -> None:
    """Write the images of a pair to FOLDERS below `folder`, all as `stem`, and the target's caption beside it."""
    for role, name in FOLDERS.items():
        if role in pair.files:
            suffix, data = pair.files[role]
            write_file(folder / name / f"{stem}{suffix}", data)
    write_file(folder / FOLDERS["target"] / f"{stem}.txt", one_line(pair.captions["target"]).encode())


def line(values: Mapping[str, Any]) -> str:
    """Return values as one line of JSON."""
    return json.dumps(values, ensure_ascii=False)


def write_file(file: Path, data: bytes) -> None:
    """Write a file, with the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def one_line(caption: str) -> str:
    """Return a caption as a line: trainers take each line of a text file for a caption of its own."""
    return " ".join(caption.split())


def refuse_masks(trainer: str, options: ExportOptions) -> None:
    """Refuse masks for a trainer that reads none.

    Raises:
        UserError: the options ask for masks.
    """
    if "mask" in options.fields:
        raise UserError(f"{trainer} reads no masks; leave mask out of --with")
