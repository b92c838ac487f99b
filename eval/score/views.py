"""The inputs of metrics for a method's images of one subject: vectors, cosines, rewards, each computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image

from eval.protocol import protocol
from eval.score import segmentation
from model.backbones.encoders import Encoder
from model.images.segment import on_white
from pipelines.photos.prefetch import prefetch
from pipelines.photos.roots import Roots

T = TypeVar("T")


@dataclass(frozen=True)
class ScoredImage:
    """An image to score, or the photo that stands for one."""

    group: str
    prompt_id: int
    index: int
    prompt: str | None
    """None for a photo without a prompt."""
    shown: tuple[str, ...]
    """frame_ids of its references."""
    made: Mapping[str, Any] | None = None
    """Its row of the generations table; None for a photo."""
    segmentation: Mapping[str, Any] | None = None
    """Its row of the segmentations table; None for a photo, which has a mask."""
    photo: int = -1
    """Index among the photos compared with; -1 for a generated image."""


@dataclass(frozen=True)
class ScoringWork:
    """A method's images of one subject, and the photos they are compared with."""

    method: str
    subject: protocol.HeldOutSubject
    photos: tuple[protocol.HeldOutPhoto, ...]
    pictures: tuple[ScoredImage, ...]
    leave_out: bool
    """Whether an image is compared only with the photos that are not its references."""
    real: bool = False
    """Whether the images are the photos: a photo is not compared with itself."""


class Models(Protocol):
    """The frozen models by name; each is loaded on first use."""

    def encoder(self, name: str) -> Encoder:
        """Return an image encoder."""

    def reward(self) -> Any:
        """Return the `model.backbones.reward.Reward`."""

    def lpips(self) -> Any:
        """Return the `model.backbones.perceptual.Perceptual`."""


class SharedVectors:
    """Vectors shared by the images of several methods: those of a subject's photos and of prompts."""

    def __init__(self) -> None:
        self.photos: dict[Hashable, np.ndarray] = {}
        self.texts: dict[tuple[str, str], np.ndarray] = {}


class ScoredImages:
    """A view of `work`; G images and P photos.

    Attributes:
        prompts: of each image; None for photos without a prompt.
        found: bool [G], whether the subject was found; true for photos.
        shown: bool [G, P], the references of each image.
        compared: bool [G, P], the photos that an image is compared with.
        siblings: a key for each image, equal for those that differ only in their seed.
    """

    def __init__(
        self,
        work: ScoringWork,
        models: Models,
        roots: Roots,
        memory: SharedVectors,
        margin: float,
        batch_size: int,
        decoders: int,
    ) -> None:
        self.work, self.models, self.roots, self.memory = work, models, roots, memory
        self.margin, self.batch_size, self.decoders = margin, batch_size, decoders
        self._cache: dict[Hashable, Any] = {}
        self.prompts = [picture.prompt for picture in work.pictures]
        self.found = np.array(
            [p.segmentation is None or p.segmentation["segmented"] for p in work.pictures], dtype=bool
        )
        ids = [photo.frame_id for photo in work.photos]
        self.shown = np.array([[frame_id in p.shown for frame_id in ids] for p in work.pictures], dtype=bool)
        self.compared = ~self.shown if work.leave_out and not work.real else np.ones_like(self.shown)
        if work.real:
            self.compared &= np.array([[p.photo != number for number in range(len(ids))] for p in work.pictures])
        self.siblings: list[Hashable] = [
            number if p.prompt is None else (p.group, p.prompt_id, p.prompt, p.shown)
            for number, p in enumerate(work.pictures)
        ]

    def __len__(self) -> int:
        return len(self.work.pictures)

    @property
    def have_siblings(self) -> bool:
        """Whether a prompt has several images."""
        return len(set(self.siblings)) < len(self)

    def images(self) -> list[Image.Image]:
        """Return the whole images, RGB."""
        return [self.image(number) for number in range(len(self))]

    def vectors(self, encoder: str, segmented: bool) -> np.ndarray:
        """Return the unit vectors [G, d] of the segments (of the whole image if nothing was found), or of the whole
        images."""
        if self.work.pictures and self.work.pictures[0].photo >= 0:
            return self.photo_vectors(encoder, segmented)[[picture.photo for picture in self.work.pictures]]
        look = self.segment if segmented else self.image
        return self.once(("vectors", encoder, segmented), lambda: self.embed(encoder, look, len(self)))

    def photo_vectors(self, encoder: str, segmented: bool) -> np.ndarray:
        """Return the unit vectors [P, d] of the photos' segments, or of the whole photos."""
        key = (encoder, segmented, self.work.subject.subject_id)
        if key not in self.memory.photos:
            look = self.photo_segment if segmented else self.photo
            self.memory.photos[key] = self.embed(encoder, look, len(self.work.photos))
        return self.memory.photos[key]

    def cosines(self, encoder: str, segmented: bool) -> np.ndarray:
        """Return the cosines [G, P] of images and photos."""
        return self.vectors(encoder, segmented) @ self.photo_vectors(encoder, segmented).T

    def prompt_cosines(self, encoder: str) -> np.ndarray:
        """Return the cosine [G] of each whole image and its prompt; NaN without one."""
        model = self.models.encoder(encoder)
        new = sorted({text for text in self.prompts if text is not None and (encoder, text) not in self.memory.texts})
        if new:
            assert (
                model.encode_text is not None
            )  # `measures.measure` gives text metrics only to encoders that read text
            self.memory.texts |= zip(((encoder, text) for text in new), _numpy(model.encode_text(new)), strict=True)
        values = np.full(len(self), np.nan)
        for number, text in self.asked():
            values[number] = self.vectors(encoder, False)[number] @ self.memory.texts[encoder, text]
        return values

    def rewards(self) -> np.ndarray:
        """Return the reward [G] of each whole image for its prompt; NaN without one."""
        asked, values = self.asked(), np.full(len(self), np.nan)
        model = self.models.reward()
        prepared = self.ahead(lambda place: model.prepare(self.image(place[0])), asked)
        for batch in _batches(zip(asked, prepared, strict=True), self.batch_size):
            found = model.rate([pixels for _, pixels in batch], [text for (_, text), _ in batch])
            values[[number for (number, _), _ in batch]] = _numpy(found)
        return values

    def distances(self) -> np.ndarray:
        """Return LPIPS [G, G] between images that differ only in their seed; NaN between others."""
        model = self.models.lpips()
        members: dict[Hashable, list[int]] = {}
        for number, key in enumerate(self.siblings):
            members.setdefault(key, []).append(number)
        order = [number for group in members.values() if len(group) > 1 for number in group]
        prepared = self.ahead(lambda number: model.prepare(self.image(number)), order)
        values = np.full((len(self), len(self)), np.nan)
        for group in members.values():
            if len(group) > 1:
                values[np.ix_(group, group)] = _numpy(model.distances(list(islice(prepared, len(group)))))
        return values

    def asked(self) -> list[tuple[int, str]]:
        """Return the index and prompt of the images that have a prompt."""
        return [(number, text) for number, text in enumerate(self.prompts) if text is not None]

    def embed(self, encoder: str, look: Callable[[int], Image.Image], count: int) -> np.ndarray:
        """Return the unit vectors [count, d] of images, preprocessed by threads while the encoder computes."""
        model = self.models.encoder(encoder)
        prepared = self.ahead(lambda number: model.prepare(look(number)), range(count))
        # Copied to the host once all batches are enqueued: one device synchronisation.
        return _numpy(torch.cat([model.embed(batch) for batch in _batches(prepared, self.batch_size)]))

    def image(self, number: int) -> Image.Image:
        """Return a whole image."""
        picture = self.work.pictures[number]
        if picture.made is None:
            return self.photo(picture.photo)
        return self.once(("image", number), lambda: segmentation.picture(picture.made or {}))

    def segment(self, number: int) -> Image.Image:
        """Return the subject of an image on white; the whole image if it was not found."""
        row = self.work.pictures[number].segmentation
        mask = segmentation.mask_of(row) if row is not None else None
        if mask is None:
            return self.image(number)
        return self.once(("segment", number), lambda: on_white(self.image(number), mask, margin=self.margin))

    def photo(self, number: int) -> Image.Image:
        """Return a whole photo."""
        return self.read(number)[0]

    def photo_segment(self, number: int) -> Image.Image:
        """Return the subject of a photo on white."""
        image, mask = self.read(number)
        return image if mask is None else on_white(image, mask, margin=self.margin)

    def read(self, number: int) -> tuple[Image.Image, np.ndarray | None]:
        """Return a photo and its mask."""
        photo = self.work.photos[number]
        return self.once(("photo", number), lambda: protocol.read_photo(self.roots, photo))

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return `compute()`, cached under `key`."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def ahead(self, prepare: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """Yield `prepare(item)` for each of `items`, computed by threads at most two batches ahead."""
        return prefetch(prepare, items, self.decoders, 2 * self.batch_size)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def _numpy(vectors: torch.Tensor) -> np.ndarray:
    return vectors.float().cpu().numpy()
