"""Photos of a subject on the page, and their masks: found by Grounded SAM, corrected by clicks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from model.backbones.grounded_sam import GroundedSam
from model.backbones.segmenters.segmenter import Box, EmbeddedPhoto
from model.images import decode
from model.images.overlay import outlined
from model.images.references import MARGIN
from model.images.segment import on_white
from model.sampler import read_image
from runtime.errors import ModelError

SHOWN = 512
"""Longer side of a photo on the page, pixels."""


@dataclass(frozen=True)
class Click:
    """A correction of a mask at x, y, in pixels of the photo."""

    x: float
    y: float
    adds: bool
    """Whether this place belongs to the subject."""
    spot: float
    """Radius of the spot that changes where SAM does not follow the click, pixels of the photo."""


@dataclass
class DemoPhoto:
    """A photo of the subject and what is known of its mask."""

    name: str
    image: Image.Image
    """RGB, upright."""
    given: np.ndarray | None
    """Mask [H, W] by the file's transparency; None if nothing is transparent."""
    noun: str | None = None
    """Class noun that was looked for; None: not yet."""
    box: Box | None = None
    """Where the noun was found; None: nowhere."""
    embedded: EmbeddedPhoto | None = None
    """The photo as SAM sees it, for clicks."""
    clicks: list[Click] = field(default_factory=list)
    mask: np.ndarray | None = None
    """bool [H, W]; None before the first search."""

    def find(self, noun: str, finder: Callable[[], GroundedSam]) -> None:
        """Look for the noun, unless it is the one already looked for; a new one discards the clicks.

        Raises ModelError for a noun that the detector does not know.
        """
        if noun == self.noun:
            return
        if self.given is None:
            models = finder()
            if not models.detector.knows(noun):
                raise ModelError(f"the detector does not know the class noun '{noun}'; use a word it was trained on")
            found = models.detect([self.image], [noun])[0]
            self.box = None if found is None else found.box
            if self.embedded is None:
                self.embedded = models.sam.embed(self.image)
        self.noun = noun
        self.clicks.clear()
        self.segment(finder)

    def click(self, click: Click, finder: Callable[[], GroundedSam]) -> None:
        """Correct the mask at one place."""
        self.clicks.append(click)
        self.segment(finder)

    def undo(self, finder: Callable[[], GroundedSam]) -> None:
        """Take the last click back."""
        if self.clicks:
            self.clicks.pop()
            self.segment(finder)

    def segment(self, finder: Callable[[], GroundedSam]) -> None:
        """Set the mask: SAM's for the box and the clicks, and a spot at each click that it does not follow.

        A click on the subject outside the box says that the box is wrong; then the clicks alone prompt SAM.
        """
        if self.given is not None:
            mask = self.given.copy()
        else:
            points = [(click.x, click.y, click.adds) for click in self.clicks]
            on_subject = [(x, y) for x, y, adds in points if adds]
            box = self.box if self.box is not None and all(is_in(self.box, *place) for place in on_subject) else None
            if self.embedded is not None and (box is not None or on_subject):
                mask = finder().sam.mask_of(self.embedded, box, points)[0]
            else:
                mask = np.zeros((self.image.height, self.image.width), dtype=bool)
        self.mask = with_spots(mask, self.clicks)

    def cut_out(self) -> Image.Image:
        """The segment on white, as the adapter reads it; ModelError if the mask is empty or was not looked for."""
        if self.mask is None or not self.mask.any():
            raise ModelError(f"{self.name}: the mask is empty; click on the subject in the photo, or remove the photo")
        return on_white(self.image, self.mask, MARGIN)

    def transparent(self) -> Image.Image:
        """The photo, RGBA, its background transparent: as a reference that `customcontrast sample` reads."""
        result = self.image.convert("RGBA")
        result.putalpha(Image.fromarray(self.mask if self.mask is not None else np.zeros(self.image.size[::-1], bool)))
        return result

    def overview(self) -> Image.Image:
        """The photo, at most `SHOWN` pixels, with the outline of its mask if it has one."""
        mask = np.zeros(self.image.size[::-1], bool) if self.mask is None else self.mask
        return outlined(self.image, mask, SHOWN)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixel of the photo at a pixel of its overview."""
        shown = self.overview().size
        return x * self.image.width / shown[0], y * self.image.height / shown[1]


def open_photos(files: Sequence[Path]) -> list[DemoPhoto]:
    """The photos in these files; ModelError for one that cannot be read."""
    photos = []
    for file in files:
        image = read_image(file, file.name)
        photos.append(DemoPhoto(file.name, decode.rgb(image), decode.transparency_mask(image)))
    return photos


def is_in(box: Box, x: float, y: float) -> bool:
    """Whether a place is inside a box."""
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def with_spots(mask: np.ndarray, clicks: Sequence[Click]) -> np.ndarray:
    """A mask [H, W] that agrees with every click: where it does not, a disc around the click changes."""
    result = mask.copy()
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    for click in clicks:
        row = min(max(int(click.y), 0), mask.shape[0] - 1)
        column = min(max(int(click.x), 0), mask.shape[1] - 1)
        if result[row, column] != click.adds:
            result[(rows - row) ** 2 + (columns - column) ** 2 <= click.spot**2] = click.adds
    return result
