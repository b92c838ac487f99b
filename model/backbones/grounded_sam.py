"""Grounded SAM (Ren et al. 2024): Grounding DINO finds the box of a phrase in a photo, SAM segments what it holds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor

from model.backbones.frozen import fixed_batches, freeze
from model.backbones.hub import from_pretrained, identify, reading, require_vocabulary, resolve
from model.backbones.sam import Box, SamConfig, Segmenter, build_sam, load_sam
from model.backbones.variant import DetectorSpec, SamSpec
from model.errors import ModelError

__all__ = [
    "Box",
    "Detection",
    "Detector",
    "GroundedSam",
    "SamConfig",
    "build_sam",
    "load_detector",
    "load_grounded_sam",
]


@dataclass(frozen=True)
class Detection:
    """The best box of a phrase in a photo."""

    box: Box
    score: float
    """Highest probability, 0..1, that a word of the phrase belongs to the box."""


@dataclass(frozen=True)
class Detector:
    """A frozen Grounding DINO (Liu et al. 2023), asked for one phrase a photo."""

    model: GroundingDinoForObjectDetection
    processor: GroundingDinoProcessor
    dtype: torch.dtype
    batch_size: int
    name: str
    revision: str

    @torch.no_grad()
    def detect(
        self, images: Sequence[Image.Image], phrases: Sequence[str], threshold: float = 0.0
    ) -> list[Detection | None]:
        """The box with the highest score for each photo's phrase, or None where no score passes `threshold`.

        Scores and boxes are those of `GroundingDinoProcessor.post_process_grounded_object_detection`. Photos are padded
        to one of a few canvases and batched with photos of the same canvas and equally many tokens, never with others:
        the backbone sees the padding, so a photo's box would otherwise depend on the company it is in.
        Raises ModelError for an empty phrase or different numbers of images and phrases.
        """
        if len(images) != len(phrases):
            raise ModelError(f"{len(images)} images and {len(phrases)} phrases; give one phrase an image")
        groups: dict[tuple[int, int, int], list[tuple[int, Tensor, list[int]]]] = defaultdict(list)
        for row, (image, phrase) in enumerate(zip(images, phrases, strict=True)):
            pixels, tokens = self.prepare(image), self.tokens(phrase)
            height, width = canvas(pixels.shape[-2], pixels.shape[-1], *self.edges())
            groups[height, width, len(tokens)].append((row, pixels, tokens))
        found: list[Detection | None] = [None] * len(images)
        for (height, width, _), members in groups.items():
            for batch, count in fixed_batches(members, self.batch_size):
                scores, boxes = self.best([m[1] for m in batch], [m[2] for m in batch], height, width)
                for (row, _, _), score, box in zip(batch[:count], scores, boxes, strict=False):
                    if score > threshold:
                        found[row] = within(images[row], box, score)
        return found

    def best(
        self, pixels: list[Tensor], tokens: list[list[int]], height: int, width: int
    ) -> tuple[list[float], list[list[float]]]:
        """Score and relative corner box of each row's best query; `pixels` [3, h, w] fit the canvas (height, width)."""
        device = self.model.device
        images = torch.stack([F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])) for x in pixels])
        seen = torch.zeros(len(pixels), height, width, dtype=torch.int64)
        for row, x in enumerate(pixels):
            seen[row, : x.shape[-2], : x.shape[-1]] = 1
        words = torch.tensor(tokens, device=device)
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            out = self.model(
                pixel_values=images.to(device),
                pixel_mask=seen.to(device),
                input_ids=words,
                token_type_ids=torch.zeros_like(words),
                attention_mask=torch.ones_like(words),
            )
        scores, query = out.logits.float().sigmoid().amax(-1).max(-1)  # [B, Q, T] -> [B]
        chosen = out.pred_boxes.float()[torch.arange(len(query), device=device), query]  # [B, 4] centre, width, height
        centre, half = chosen[:, :2], chosen[:, 2:] / 2
        return scores.tolist(), torch.cat([centre - half, centre + half], dim=1).tolist()

    def prepare(self, image: Image.Image) -> Tensor:
        """The photo resized and normalised as the checkpoint's processor says, unpadded, [3, h, w]."""
        out = self.processor.image_processor(images=[image], do_pad=False, return_tensors="pt")
        pixels: Tensor = out["pixel_values"][0]
        return pixels

    def reads(self, phrase: str) -> bool:
        """Whether `phrase` is within the text encoder's length."""
        return len(self.encoded(phrase)) <= self.model.config.max_text_len

    def tokens(self, phrase: str) -> list[int]:
        """Token ids of `phrase`, lower-case and closed by a dot, as Grounding DINO was trained."""
        ids = self.encoded(phrase)
        if not self.reads(phrase):
            limit = self.model.config.max_text_len
            raise ModelError(f"phrase '{phrase}' has {len(ids)} tokens and {self.name} reads {limit}; shorten it")
        return ids

    def encoded(self, phrase: str) -> list[int]:
        """Token ids of `phrase`, however long."""
        words = " ".join(phrase.lower().replace(".", " ").split())
        if not words:
            raise ModelError(f"phrase '{phrase}' holds no word; give the subject's class noun")
        ids: list[int] = self.processor.tokenizer(f"{words}.")["input_ids"]
        return ids

    def edges(self) -> tuple[int, int] | tuple[None, None]:
        """Shortest and longest side the processor resizes to; None where it resizes to one size or not at all."""
        resize = self.processor.image_processor
        if resize.do_resize and resize.size.get("shortest_edge"):
            return resize.size["shortest_edge"], resize.size["longest_edge"]
        return None, None


@dataclass(frozen=True)
class GroundedSam:
    """Detector and segmenter together."""

    detector: Detector
    sam: Segmenter

    @property
    def name(self) -> str:
        """Both encoders, as `<detector>@<revision>+<sam>@<revision>` with 12 digits of each revision."""
        return "+".join(f"{part.name}@{part.revision[:12]}" for part in (self.detector, self.sam))

    def detect(
        self, images: Sequence[Image.Image], phrases: Sequence[str], threshold: float = 0.0
    ) -> list[Detection | None]:
        """See `Detector.detect`."""
        return self.detector.detect(images, phrases, threshold)

    def reads(self, phrase: str) -> bool:
        """Whether the detector can be asked for `phrase`."""
        return self.detector.reads(phrase)

    def segment(self, images: Sequence[Image.Image], boxes: Sequence[Box]) -> tuple[list[np.ndarray], list[float]]:
        """See `Segmenter.segment`."""
        return self.sam.segment(images, boxes)


def load_grounded_sam(
    detector_spec: DetectorSpec,
    sam_spec: SamSpec,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
) -> GroundedSam:
    """Both frozen models on `device`; the heavy parts compute as `dtype`, results are float32."""
    return GroundedSam(
        load_detector(detector_spec, device, dtype, batch_size), load_sam(sam_spec, device, dtype, batch_size)
    )


def load_detector(
    spec: DetectorSpec, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 8
) -> Detector:
    """The frozen Grounding DINO of `spec`; raises ModelError where its folder is missing or unfit."""
    folder = resolve(spec, ["*.json", "*.txt", "model*.safetensors"])
    what = "a transformers folder of Grounding DINO"
    # The compiled CUDA attention would be fetched at run time; the one written in torch does the same arithmetic.
    options = {"dtype": torch.float32, "disable_custom_kernels": True}
    model = from_pretrained(GroundingDinoForObjectDetection, folder, spec.path, what, **options)
    with reading(spec.path, what):
        require_vocabulary(folder)
        processor = GroundingDinoProcessor.from_pretrained(folder, local_files_only=True)
    name, revision = identify(spec, folder.glob("*.safetensors"))
    # Autocast, not a cast: text masks and box offsets need float32's range and precision.
    return Detector(freeze(model, device), processor, dtype, batch_size, name, revision)


def canvas(height: int, width: int, shortest: int | None, longest: int | None) -> tuple[int, int]:
    """The smallest of five canvases (square, 4:3 and longest, lying or standing) that holds a resized photo.

    (height, width) come from the processor, which bounds the sides by `shortest` and `longest`, all in pixels.
    """
    if shortest is None or longest is None:
        return height, width
    sides = sorted({shortest, min(math.ceil(shortest * 4 / 3 / 32) * 32, longest), longest})
    long = next((side for side in sides if side >= max(height, width)), max(height, width))
    short = max(shortest, min(height, width))
    return (short, long) if height <= width else (long, short)


def within(image: Image.Image, box: Sequence[float], score: float) -> Detection | None:
    """`box` (corners relative to the photo) in its pixels, cut to it; None where nothing is left."""
    x0, x1 = (min(max(x, 0.0), 1.0) * image.width for x in (box[0], box[2]))
    y0, y1 = (min(max(y, 0.0), 1.0) * image.height for y in (box[1], box[3]))
    return Detection((x0, y0, x1, y1), score) if x1 > x0 and y1 > y0 else None
