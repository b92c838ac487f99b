"""What the trainings know of an embedded world: what can be seen in it, its training sets, its words, its folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.toybox.rendering.render import Rendered


class LessonSet(Protocol):
    """Contents of one set, a frozen dataclass.

    name, seed: of the set. subjects: how many. views: images per subject, consecutive in the arrays.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def subjects(self) -> int: ...
    @property
    def views(self) -> int: ...
    def __len__(self) -> int: ...
    def item(self, index: int) -> Any:
        """What the world's renderer needs of one image: a function of the set and the index alone."""
        ...

    def captions(self, index: int) -> list[str]:
        """Every caption of an image: templates x details, details varying fastest."""
        ...


@dataclass(frozen=True)
class DetectorQuery:
    """A phrase for the detector to look for in each of B images.

    phrase: int64 [B], places in the world's phrases. shown: bool [B], whether the image shows it; if not, the answer is
    no box. whole: bool [B], whether the box encloses all that the subject wears too.
    """

    phrase: NDArray[np.int64]
    shown: NDArray[np.bool_]
    whole: NDArray[np.bool_]


@dataclass(frozen=True)
class Sheet:
    """A sheet of samples: every subject (column) with every prompt (row); `{}` in a prompt stands for the subject."""

    path: Path
    subjects: tuple[str, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """An embedded world, as its trainings see it. Functions of a table take int16 [B, len(attributes)].

    name: as on the command line. weights: folder of the published backbones; work: of images, checkpoints and logs.
    attributes: columns of a set's attributes and the names of their values. sets: by name. vocabulary: every word of a
    caption. details: how much a caption tells of the subject; named: the attributes that a caption of each tells.
    """

    name: str
    weights: Path
    work: Path
    attributes: Mapping[str, tuple[str, ...]]
    sets: Mapping[str, LessonSet]
    render: Callable[[Sequence[Any], int, Any], Rendered]
    """Images of items, their side in pixels, and the device."""
    row: Callable[[Any], list[int]]
    """The values of `attributes` of one item."""
    visible: Callable[[NDArray[np.int16]], NDArray[np.bool_]]
    """Which attributes an image shows, of the shape of the table."""
    asked: Callable[[NDArray[np.int16]], NDArray[np.bool_]]
    """Which attributes the full caption of such an image asks for by name, and the image shows."""
    prompt: Callable[[np.random.Generator, bool], tuple[str, list[int]]]
    """A full caption and its attributes, of a held-out subject or of another."""
    vocabulary: tuple[str, ...]
    details: tuple[str, ...]
    named: Mapping[str, tuple[str, ...]]
    noun: str
    """The attribute that says what kind of subject it is."""
    phrases: tuple[str, ...]
    """What the detector looks for."""
    subject_phrase: Callable[[NDArray[np.int16]], NDArray[np.int64]]
    """The phrase of the subject without what it wears."""
    ask: Callable[[NDArray[np.int16], np.random.Generator], DetectorQuery]
    """What the detector is asked in training."""
    examine: Callable[[NDArray[np.int16], np.random.Generator], tuple[DetectorQuery, NDArray[np.int64]]]
    """What it is asked in a measurement, and a phrase of something that the image does not show."""
    painted: Mapping[str, float]
    """Minimum fraction of generated images in which the judge sees the attribute that the caption names."""
    judged: Mapping[str, float]
    """The same of renders."""
    sheet: Sheet
    names: tuple[str, ...] = ()
    """Names of subjects that text-to-image knows, of which `vocabulary` holds no word."""
    whole: float = 0.0
    """Share of boxes from which the segmenter learns the subject with all that it wears."""

    def column(self, table: NDArray[np.int16], name: str) -> NDArray[np.int16]:
        """One attribute of every row, int16 [B]."""
        return table[:, list(self.attributes).index(name)]

    def only(self, table: NDArray[np.int16], **rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """True of the shape of `table`, except where an attribute's `rows` are False."""
        shown = np.ones(table.shape, bool)
        for name, where in rows.items():
            shown[:, list(self.attributes).index(name)] = where
        return shown
