"""What a segmenter can do: one prompt in, a box or points of a photo, one mask out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.backbones.frozen import fixed_batches
from model.backbones.hub import sha256
from model.backbones.variant import SamSpec
from runtime.errors import ModelError

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the photo."""
PromptPoint = tuple[float, float, bool]
"""x, y in pixels of the photo; True: on the subject, False: on the background."""


@dataclass(frozen=True)
class EmbeddedPhoto:
    """A photo after the image encoder, which any number of prompts can query."""

    features: tuple[Tensor, ...]
    """[c, h, w] each, float32; prompts attend to the last, the others are finer."""
    size: tuple[int, int]
    """(height, width) as the image encoder reads it, without padding."""
    full: tuple[int, int]
    """(height, width) of the photo, pixels."""

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the image encoder per pixel of the photo, in x and y."""
        return self.size[1] / self.full[1], self.size[0] / self.full[0]


@dataclass(frozen=True)
class Segmenter(ABC):
    """A frozen segmenter.

    A single point alone is ambiguous (part, object or group): of the masks that the model has for that case, the one
    with the highest predicted IoU counts. Any other prompt gets the single-mask output.
    """

    model: Any
    batch_size: int
    """Photos per call of the image encoder."""
    name: str
    revision: str

    @abstractmethod
    def prepare(self, image: Image.Image) -> Tensor:
        """The photo resized for the image encoder, uint8 [3, h, w]; on the CPU, for threads."""

    @abstractmethod
    def encode(self, photos: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """The features of each photo's output of `prepare`, as `EmbeddedPhoto` has them."""

    @abstractmethod
    def decode(
        self, photo: EmbeddedPhoto, box: Box | None, points: Sequence[PromptPoint] = ()
    ) -> tuple[Tensor, Tensor]:
        """Mask (bool, of the photo's size) and predicted IoU of one prompt, on the device."""

    def segment(self, images: Sequence[Image.Image], boxes: Sequence[Box]) -> tuple[list[np.ndarray], list[float]]:
        """The mask of each box's content: (bool arrays [H, W] at the photos' sizes, predicted IoUs 0..1).

        One mask per box, the decoder's single-mask output: a box resolves whether part, object or group is meant. Steps
        and arithmetic are those of the model's own library, except that the image encoder runs in batches. Raises
        ModelError if the numbers of images and boxes differ.
        """
        if len(images) != len(boxes):
            raise ModelError(f"{len(images)} images and {len(boxes)} boxes; give one box per image")
        photos = [
            (self.prepare(image), (image.height, image.width), box) for image, box in zip(images, boxes, strict=True)
        ]
        return self.cut(photos)

    @torch.no_grad()
    def cut(self, photos: Sequence[tuple[Tensor, tuple[int, int], Box]]) -> tuple[list[np.ndarray], list[float]]:
        """As `segment`, for photos as (output of `prepare`, (height, width) of the photo, box)."""
        masks: list[np.ndarray] = []
        scores: list[float] = []
        for batch, count in fixed_batches(photos, self.batch_size):
            encoded = self.encode([x for x, _, _ in batch])
            decoded = [
                self.decode(EmbeddedPhoto(features, (x.shape[-2], x.shape[-1]), full), box)
                for (x, full, box), features in zip(batch[:count], encoded, strict=False)
            ]
            # Fetched once all are queued: the device synchronises once per batch.
            masks += [mask.cpu().numpy() for mask, _ in decoded]
            scores += torch.stack([score for _, score in decoded]).tolist()
        return masks, scores

    @torch.no_grad()
    def embed(self, image: Image.Image) -> EmbeddedPhoto:
        """A photo after the image encoder, for `mask_of`."""
        prepared = self.prepare(image)
        height, width = prepared.shape[-2:]
        return EmbeddedPhoto(self.encode([prepared])[0], (height, width), (image.height, image.width))

    @torch.no_grad()
    def mask_of(
        self, photo: EmbeddedPhoto, box: Box | None = None, points: Sequence[PromptPoint] = ()
    ) -> tuple[np.ndarray, float]:
        """Mask (bool [H, W], of the photo's size) and predicted IoU 0..1 of a prompt: a box, points, or both.

        Raises ModelError without either.
        """
        if box is None and not points:
            raise ModelError("SAM was given neither a box nor a point; give one")
        mask, score = self.decode(photo, box, points)
        return mask.cpu().numpy(), float(score)


def is_ambiguous(box: Box | None, points: Sequence[PromptPoint]) -> bool:
    """Whether a prompt leaves open if a part, an object or a group is meant."""
    return box is None and len(points) == 1


def require_digest(spec: SamSpec, files: Sequence[Path], source: str = "the file") -> None:
    """Raise ModelError if the weight files, to be had from `source`, do not have the digest that the variant gives."""
    if spec.sha256 is not None and (digest := sha256(files)) != spec.sha256:
        raise ModelError(
            f"{spec.path}: SHA-256 is {digest}, not {spec.sha256}; download {source} again, or correct the JSON"
        )
