"""Grounded SAM (Ren et al. 2024): Grounding DINO finds the box of a phrase in a photo, SAM or SAM 2 segments it.

Or SAM 3 does both.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor, MMGroundingDinoForObjectDetection
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoBiMultiHeadAttention
from transformers.models.mm_grounding_dino.modeling_mm_grounding_dino import MMGroundingDinoBiMultiHeadAttention

from model.backbones.frozen import fixed_batches, freeze
from model.backbones.hub import from_pretrained, identify, model_type, reading, require_vocabulary, resolve
from model.backbones.segmenters.detection import Cut, Detection, best_boxes, within
from model.backbones.segmenters.sam import SamConfig, build_sam, load_sam
from model.backbones.segmenters.sam2 import load_sam2
from model.backbones.segmenters.sam3 import TYPES as SAM3_TYPES
from model.backbones.segmenters.sam3 import Sam3, load_sam3
from model.backbones.segmenters.segmenter import Box, Segmenter
from model.backbones.variant import DetectorSpec, SamSpec, Spec
from runtime.errors import ModelError

__all__ = [
    "Box",
    "BoxSam",
    "Cut",
    "Detection",
    "Detector",
    "GroundedSam",
    "PhraseSam",
    "Prepared",
    "SamConfig",
    "build_sam",
    "load_detector",
    "load_grounded_sam",
    "load_segmenter",
]

K = TypeVar("K")

DETECTORS: dict[str, Any] = {
    "grounding-dino": GroundingDinoForObjectDetection,
    "mm-grounding-dino": MMGroundingDinoForObjectDetection,
}
"""By `model_type` of a folder's config.json: the class; LLMDet (Fu et al. 2025) is an MM-Grounding-DINO."""
FUSIONS = (GroundingDinoBiMultiHeadAttention, MMGroundingDinoBiMultiHeadAttention)

TOKENS = 8
"""Phrases are padded to a multiple of this, so that one-word and four-word nouns share batches."""


@dataclass(frozen=True)
class Prepared:
    """A photo preprocessed for both models; the photo itself, which may be far larger, can be freed."""

    size: tuple[int, int]
    """(height, width) of the photo, pixels."""
    detector: Tensor
    """[3, h, w] float32, resized and normalised."""
    sam: Tensor
    """[3, h, w] uint8, resized: see `Segmenter.prepare`."""


@dataclass(frozen=True)
class Detector:
    """A frozen Grounding DINO (Liu et al. 2023), MM-Grounding-DINO (Zhao et al. 2024) or LLMDet; a phrase per photo."""

    model: GroundingDinoForObjectDetection | MMGroundingDinoForObjectDetection
    processor: GroundingDinoProcessor
    dtype: torch.dtype
    batch_size: int
    name: str
    revision: str

    def detect(
        self, images: Sequence[Image.Image], phrases: Sequence[str], threshold: float = 0.0
    ) -> list[Detection | None]:
        """The box with the highest score for each photo's phrase, or None if no score exceeds `threshold`.

        Scores and boxes are those of `GroundingDinoProcessor.post_process_grounded_object_detection`. Raises ModelError
        for an empty phrase or different numbers of images and phrases.
        """
        if len(images) != len(phrases):
            raise ModelError(f"{len(images)} images and {len(phrases)} phrases; give one phrase per image")
        queries = (
            (row, self.prepare(image), (image.height, image.width), phrase)
            for row, (image, phrase) in enumerate(zip(images, phrases, strict=True))
        )
        found: list[Detection | None] = [None] * len(images)
        for row, detection in self.find(queries):
            if detection is not None and detection.score > threshold:
                found[row] = detection
        return found

    def find(self, photos: Iterable[tuple[K, Tensor, tuple[int, int], str]]) -> Iterator[tuple[K, Detection | None]]:
        """The best box of each photo as soon as its batch is full, in the order in which batches fill.

        A photo is (any key, output of `prepare`, its (height, width), phrase); photos are read lazily, and few of them
        are held at a time.
        Photos are padded to one of a few canvases and phrases to one of a few lengths, and only those of equal size
        share a batch: the backbone sees the padding, so a photo's box would otherwise depend on its batch.
        """
        waiting: dict[tuple[int, int, int], list[tuple[K, Tensor, tuple[int, int], list[int]]]] = defaultdict(list)
        for key, pixels, size, phrase in photos:
            tokens = self.tokens(phrase)
            shape = (*canvas(pixels.shape[-2], pixels.shape[-1], *self.edges()), self.padded(len(tokens)))
            waiting[shape].append((key, pixels, size, tokens))
            if len(waiting[shape]) == self.batch_size:
                yield from self.answer(waiting.pop(shape), *shape)
        for shape, rest in waiting.items():
            yield from self.answer(rest, *shape)

    def answer(
        self, photos: list[tuple[K, Tensor, tuple[int, int], list[int]]], height: int, width: int, length: int
    ) -> Iterator[tuple[K, Detection | None]]:
        """The best box of each of up to `batch_size` photos with one canvas and length."""
        for batch, count in fixed_batches(photos, self.batch_size):
            found = self.best([p[1] for p in batch], [p[3] for p in batch], height, width, length)
            for (key, _, size, _), score, box, other in zip(batch[:count], *found, strict=False):
                yield key, within(size, box, score, other)

    @torch.no_grad()
    def best(
        self, pixels: list[Tensor], tokens: list[list[int]], height: int, width: int, length: int
    ) -> tuple[list[float], list[list[float]], list[float]]:
        """Score and relative corner box of each row's best query, and the best score elsewhere.

        `pixels` [3, h, w] fit the canvas (height, width) in pixels, `tokens` fit `length`.
        """
        device = self.model.device
        images = torch.stack([F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])) for x in pixels])
        pixel_mask = torch.zeros(len(pixels), height, width, dtype=torch.int64)
        for row, x in enumerate(pixels):
            pixel_mask[row, : x.shape[-2], : x.shape[-1]] = 1
        words = torch.zeros(len(tokens), length, dtype=torch.int64)
        text_mask = torch.zeros_like(words)
        for row, ids in enumerate(tokens):
            words[row, : len(ids)] = torch.tensor(ids)
            text_mask[row, : len(ids)] = 1
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            out = self.model(
                pixel_values=images.to(device),
                pixel_mask=pixel_mask.to(device),
                input_ids=words.to(device),
                token_type_ids=torch.zeros_like(words).to(device),
                attention_mask=text_mask.to(device),
            )
        scores = out.logits.float().sigmoid().amax(-1)  # [B, Q, T] -> [B, Q]
        centre, half = out.pred_boxes.float()[..., :2], out.pred_boxes.float()[..., 2:] / 2
        boxes = torch.cat([centre - half, centre + half], dim=-1)  # [B, Q, 4]
        best, _, chosen, other = best_boxes(scores, boxes)
        return best.tolist(), chosen.tolist(), other.tolist()

    def padded(self, count: int) -> int:
        """Padded length of a phrase of `count` tokens; padding is masked everywhere in the model."""
        return max(count, min(-(-count // TOKENS) * TOKENS, self.model.config.max_text_len))

    def prepare(self, image: Image.Image) -> Tensor:
        """The photo resized and normalised by the checkpoint's processor, unpadded, [3, h, w]; for threads."""
        out = self.processor.image_processor(images=[image], do_pad=False, return_tensors="pt")
        pixels: Tensor = out["pixel_values"][0]
        return pixels

    def reads(self, phrase: str) -> bool:
        """Whether `phrase` fits the text encoder's length."""
        return len(self.encoded(phrase)) <= self.model.config.max_text_len

    def knows(self, phrase: str) -> bool:
        """Whether the tokenizer has every word of `phrase`; a large vocabulary has any word in pieces."""
        return self.processor.tokenizer.unk_token_id not in self.encoded(phrase)

    def tokens(self, phrase: str) -> list[int]:
        """Token ids of `phrase`, lower-cased and ending in a dot, as in Grounding DINO's training."""
        ids, limit = self.encoded(phrase), self.model.config.max_text_len
        if len(ids) > limit:
            raise ModelError(
                f"phrase '{phrase}' has {len(ids)} tokens, but {self.name} reads at most {limit}; shorten it"
            )
        return ids

    def encoded(self, phrase: str) -> list[int]:
        """Token ids of `phrase`, of any length."""
        words = " ".join(phrase.lower().replace(".", " ").split())
        if not words:
            raise ModelError(f"phrase '{phrase}' contains no word; give the subject's class noun")
        ids: list[int] = self.processor.tokenizer(f"{words}.")["input_ids"]
        return ids

    def edges(self) -> tuple[int, int] | tuple[None, None]:
        """Shortest and longest side the processor resizes to; None if it resizes to one size or not at all."""
        resize = self.processor.image_processor
        if resize.do_resize and resize.size.get("shortest_edge"):
            return resize.size["shortest_edge"], resize.size["longest_edge"]
        return None, None


@dataclass(frozen=True)
class GroundedSam(ABC):
    """Finds the object that a phrase names, and segments it."""

    detector: Detector | Sam3
    segmenter: Callable[[], Segmenter]
    """Returns the segmenter, loading it if that has been put off."""

    @property
    def sam(self) -> Segmenter:
        """The segmenter."""
        return self.segmenter()

    @property
    @abstractmethod
    def name(self) -> str:
        """The models, each as `<name>@<12 digits of the revision>`, joined by `+`."""

    @abstractmethod
    def prepare(self, image: Image.Image) -> Prepared:
        """`image` preprocessed for the models; runs on the CPU, so threads can do it while the device is busy."""

    @abstractmethod
    def cut_out(
        self, photos: Iterable[tuple[K, Prepared, str]], min_score: float
    ) -> Iterator[tuple[K, Detection | None, Cut | None]]:
        """Box and mask of the object named by each photo's phrase, in the order in which batches fill.

        A photo is (any key, output of `prepare`, phrase); photos are read lazily, and few batches of them are held. The
        mask is None if no box has at least `min_score`.
        """

    def cut_one(self, image: Image.Image, phrase: str) -> tuple[Detection | None, Cut | None]:
        """Box and mask of the object named by `phrase`; None if nothing is found."""
        ((_, detection, cut),) = self.cut_out([(0, self.prepare(image), phrase)], 0.0)
        return detection, cut

    def detect(
        self, images: Sequence[Image.Image], phrases: Sequence[str], threshold: float = 0.0
    ) -> list[Detection | None]:
        """See `Detector.detect`."""
        return self.detector.detect(images, phrases, threshold)

    def reads(self, phrase: str) -> bool:
        """Whether the detector can be queried with `phrase`."""
        return self.detector.reads(phrase)

    def segment(self, images: Sequence[Image.Image], boxes: Sequence[Box]) -> tuple[list[np.ndarray], list[float]]:
        """See `Segmenter.segment`."""
        return self.sam.segment(images, boxes)


@dataclass(frozen=True)
class BoxSam(GroundedSam):
    """A detector, whose box prompts a segmenter."""

    detector: Detector

    @property
    def name(self) -> str:
        """Both encoders, as `<detector>@<revision>+<sam>@<revision>` with 12 digits of each revision."""
        return "+".join(f"{part.name}@{part.revision[:12]}" for part in (self.detector, self.sam))

    def prepare(self, image: Image.Image) -> Prepared:
        """See `GroundedSam.prepare`."""
        return Prepared((image.height, image.width), self.detector.prepare(image), self.sam.prepare(image))

    def cut_out(
        self, photos: Iterable[tuple[K, Prepared, str]], min_score: float
    ) -> Iterator[tuple[K, Detection | None, Cut | None]]:
        """See `GroundedSam.cut_out`; at most one batch per canvas and one for SAM are held."""
        queries = (((key, photo), photo.detector, photo.size, phrase) for key, photo, phrase in photos)
        boxed: list[tuple[K, Prepared, Detection]] = []
        for (key, photo), detection in self.detector.find(queries):
            if detection is None or detection.score < min_score:
                yield key, detection, None
                continue
            boxed.append((key, photo, detection))
            if len(boxed) == self.sam.batch_size:
                yield from self.cut(boxed)
                boxed = []
        yield from self.cut(boxed)

    def cut(self, boxed: Sequence[tuple[K, Prepared, Detection]]) -> Iterator[tuple[K, Detection, Cut]]:
        """The masks of photos with known boxes."""
        masks, scores = self.sam.cut([(photo.sam, photo.size, found.box) for _, photo, found in boxed])
        for (key, _, detection), mask, score in zip(boxed, masks, scores, strict=True):
            yield key, detection, Cut(mask, score)


@dataclass(frozen=True)
class PhraseSam(GroundedSam):
    """A SAM 3, which finds and segments at once; the segmenter beside it is for clicks, and loaded by the first."""

    detector: Sam3

    @property
    def name(self) -> str:
        """`<model>@<12 digits of the revision>`."""
        return f"{self.detector.name}@{self.detector.revision[:12]}"

    def prepare(self, image: Image.Image) -> Prepared:
        """See `GroundedSam.prepare`; one tensor is for both."""
        pixels = self.detector.prepare(image)
        return Prepared((image.height, image.width), pixels, pixels)

    def cut_out(
        self, photos: Iterable[tuple[K, Prepared, str]], min_score: float
    ) -> Iterator[tuple[K, Detection | None, Cut | None]]:
        """See `GroundedSam.cut_out`."""
        return self.detector.find(((key, photo.sam, photo.size, phrase) for key, photo, phrase in photos), min_score)


def load_grounded_sam(
    detector_spec: DetectorSpec,
    sam_spec: SamSpec,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
) -> GroundedSam:
    """Both frozen models on `device`; the heavy parts compute in `dtype`, results are float32.

    A detector that is a SAM 3 is both.
    """
    if folder_type(detector_spec) in SAM3_TYPES:
        later = cache(partial(load_segmenter, sam_spec, device, dtype, batch_size))
        return PhraseSam(load_sam3(detector_spec, device, dtype, batch_size), later)
    detector = load_detector(detector_spec, device, dtype, batch_size)
    segmenter = load_segmenter(sam_spec, device, dtype, batch_size)
    return BoxSam(detector, lambda: segmenter)


def load_segmenter(
    spec: SamSpec, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 8
) -> Segmenter:
    """The frozen segmenter of `spec`: a transformers folder is of SAM 2, all else of SAM.

    Raises ModelError if it is missing or invalid.
    """
    is_sam2 = spec.size is None and folder_type(spec) is not None
    return (load_sam2 if is_sam2 else load_sam)(spec, device, dtype, batch_size)


def folder_type(spec: Spec) -> str | None:
    """Model type of a transformers folder; None of other checkpoints, and of invalid ones, which loaders explain."""
    try:
        return model_type(resolve(spec, ["config.json"]))
    except (OSError, ValueError):
        return None


def load_detector(
    spec: DetectorSpec, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 8
) -> Detector:
    """The frozen detector of `spec`, of the class that its config.json names; raises ModelError if it is missing or
    invalid."""
    folder = resolve(spec, ["*.json", "*.txt", "model*.safetensors"])
    what = "a transformers folder of Grounding DINO"
    with reading(spec.path, what):
        if (found := model_type(folder)) not in DETECTORS:
            raise ValueError(f"its model_type is {found}")
    # The compiled CUDA attention would be downloaded at run time; the PyTorch one does the same arithmetic.
    options: dict[str, Any] = {"dtype": torch.float32, "disable_custom_kernels": True}
    model = from_pretrained(DETECTORS[found], folder, spec.path, what, **options)
    fuse_photo_by_photo(model)
    with reading(spec.path, what):
        require_vocabulary(folder)
        processor = GroundingDinoProcessor.from_pretrained(folder, local_files_only=True)
    name, revision = identify(spec, folder.glob("*.safetensors"))
    # Autocast, not a cast: text masks and box offsets need float32's range and precision.
    return Detector(freeze(model, device), processor, dtype, batch_size, name, revision)


def fuse_photo_by_photo(model: nn.Module) -> None:
    """Let each attention between photo and phrase in `model` see one photo at a time.

    transformers subtracts the greatest weight of the whole batch before the softmax, which changes the rounding of each
    photo's result with the other photos in its batch.
    """
    for module in model.modules():
        if isinstance(module, FUSIONS):
            module.forward = partial(one_at_a_time, module.forward)


def one_at_a_time(
    forward: Callable[..., tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]], *batch: Any, **named: Any
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`forward` of each row of the tensors [B, ...]; (output, weights) of the photos and of the phrases."""
    count = len(next(value for value in (*batch, *named.values()) if value is not None))
    rows = [
        forward(*(one(value, row) for value in batch), **{name: one(value, row) for name, value in named.items()})
        for row in range(count)
    ]
    photo, phrase = (tuple(torch.cat(parts) for parts in zip(*side, strict=True)) for side in zip(*rows, strict=True))
    return cast(Any, (photo, phrase))


def one(value: Tensor | None, row: int) -> Tensor | None:
    """Row `row` of `value` as a batch of its own."""
    return None if value is None else value[row : row + 1]


def canvas(height: int, width: int, shortest: int | None, longest: int | None) -> tuple[int, int]:
    """The smallest of five canvases (square, 4:3 and longest, landscape or portrait) that fits a resized photo.

    (height, width) come from the processor, which bounds the sides by `shortest` and `longest`, all in pixels.
    """
    if shortest is None or longest is None:
        return height, width
    sides = sorted({shortest, min(math.ceil(shortest * 4 / 3 / 32) * 32, longest), longest})
    long = next((side for side in sides if side >= max(height, width)), max(height, width))
    short = max(shortest, min(height, width))
    return (short, long) if height <= width else (long, short)
