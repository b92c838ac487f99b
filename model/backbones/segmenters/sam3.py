"""SAM 3 (Carion et al. 2025) of transformers on single photos: a phrase in, boxes, scores and masks out.

On disk: a transformers folder of Sam3Model, or of Sam3VideoModel as `facebook/sam3` is published, of which the weights
that only a video needs are left unread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, Sam3ImageProcessor, Sam3Model

from model.backbones.frozen import fixed_batches, freeze, normalised
from model.backbones.hub import from_pretrained, identify, reading, require_vocabulary, resolve
from model.backbones.segmenters.detection import Cut, Detection, best_boxes, within
from model.backbones.variant import DetectorSpec
from runtime.errors import ModelError

K = TypeVar("K")

TYPES = ("sam3", "sam3_video")
"""Model types of a folder for photos, or for videos."""
TOKENS = 32
"""Every phrase is padded to this length, as in the processor."""


@dataclass(frozen=True)
class Sam3:
    """A frozen SAM 3; one phrase per photo. Scores and masks are those of `transformers.Sam3Processor`."""

    model: Sam3Model
    processor: Sam3ImageProcessor
    tokenizer: Any
    dtype: torch.dtype
    batch_size: int
    name: str
    revision: str

    def detect(
        self, images: Sequence[Image.Image], phrases: Sequence[str], threshold: float = 0.0
    ) -> list[Detection | None]:
        """As `Detector.detect`."""
        if len(images) != len(phrases):
            raise ModelError(f"{len(images)} images and {len(phrases)} phrases; give one phrase per image")
        photos = (
            (row, self.prepare(image), (image.height, image.width), phrase)
            for row, (image, phrase) in enumerate(zip(images, phrases, strict=True))
        )
        found = {row: detection for row, detection, _ in self.find(photos, threshold)}
        chosen = (found[row] for row in range(len(images)))
        return [one if one is not None and one.score > threshold else None for one in chosen]

    def find(
        self, photos: Iterable[tuple[K, Tensor, tuple[int, int], str]], min_score: float
    ) -> Iterator[tuple[K, Detection | None, Cut | None]]:
        """Best box and its mask of each photo, as soon as its batch is full.

        A photo is (any key, output of `prepare`, its (height, width), phrase); photos are read lazily, and one batch of
        them is held. The mask is None if no box has at least `min_score`. A mask has no predicted IoU, so 1.
        """
        waiting: list[tuple[K, Tensor, tuple[int, int], list[int]]] = []
        for key, pixels, size, phrase in photos:
            waiting.append((key, pixels, size, self.tokens(phrase)))
            if len(waiting) == self.batch_size:
                yield from self.answer(waiting, min_score)
                waiting = []
        yield from self.answer(waiting, min_score)

    @torch.no_grad()
    def answer(
        self, photos: list[tuple[K, Tensor, tuple[int, int], list[int]]], min_score: float
    ) -> Iterator[tuple[K, Detection | None, Cut | None]]:
        """Box and mask of each of up to `batch_size` photos."""
        device = self.model.device
        for batch, count in fixed_batches(photos, self.batch_size):
            pixels = torch.stack([x.to(device) for _, x, _, _ in batch]).float() * self.processor.rescale_factor
            words = [ids + [self.tokenizer.pad_token_id] * (TOKENS - len(ids)) for *_, ids in batch]
            mask = [[1] * len(ids) + [0] * (TOKENS - len(ids)) for *_, ids in batch]
            with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                out = self.model(
                    pixel_values=normalised(pixels, self.processor.image_mean, self.processor.image_std),
                    input_ids=torch.tensor(words, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                )
            # The score of a query, times that the phrase is in the photo at all.
            scores = out.pred_logits.float().sigmoid() * out.presence_logits.float().sigmoid()
            best, query, chosen, other = best_boxes(scores, out.pred_boxes.float())
            masks = out.pred_masks[torch.arange(len(query), device=device), query].float().sigmoid()
            rows = zip(batch[:count], best.tolist(), chosen.tolist(), other.tolist(), masks, strict=False)
            for (key, _, size, _), score, box, elsewhere, small in rows:
                detection = within(size, box, score, elsewhere)
                if detection is None or detection.score < min_score:
                    yield key, detection, None
                    continue
                large = F.interpolate(small[None, None], size, mode="bilinear", align_corners=False)[0, 0]
                yield key, detection, Cut((large > 0.5).cpu().numpy(), 1.0)

    def prepare(self, image: Image.Image) -> Tensor:
        """The photo squeezed to the encoder's square, uint8 [3, s, s]; on the CPU, for threads."""
        # Normalised on the device: float32 would take four times the memory while it waits.
        out = self.processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt")
        pixels: Tensor = out["pixel_values"][0]
        return pixels

    def reads(self, phrase: str) -> bool:
        """Whether `phrase` fits the text encoder's length."""
        return len(self.encoded(phrase)) <= TOKENS

    def knows(self, phrase: str) -> bool:
        """Whether the tokenizer has every word of `phrase`: a byte-pair vocabulary has any in pieces."""
        return bool(self.encoded(phrase))

    def tokens(self, phrase: str) -> list[int]:
        """Token ids of `phrase`, without padding."""
        ids = self.encoded(phrase)
        if len(ids) > TOKENS:
            raise ModelError(
                f"phrase '{phrase}' has {len(ids)} tokens, but {self.name} reads at most {TOKENS}; shorten it"
            )
        return ids

    def encoded(self, phrase: str) -> list[int]:
        """Token ids of `phrase`, of any length."""
        words = " ".join(phrase.split())
        if not words.replace(".", "").strip():
            raise ModelError(f"phrase '{phrase}' contains no word; give the subject's class noun")
        ids: list[int] = self.tokenizer(words)["input_ids"]
        return ids


def load_sam3(
    spec: DetectorSpec, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 8
) -> Sam3:
    """The frozen SAM 3 of `spec`, its heavy parts computing in `dtype`; raises ModelError if it is missing or
    invalid."""
    folder = resolve(spec, ["*.json", "*.txt", "model*.safetensors"])
    what = "a transformers folder of SAM 3"
    model = from_pretrained(Sam3Model, folder, spec.path, what, TYPES, dtype=torch.float32)
    with reading(spec.path, what):
        require_vocabulary(folder)
        processor = Sam3ImageProcessor.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    name, revision = identify(spec, folder.glob("*.safetensors"))
    # Autocast, not a cast: text masks and box offsets need float32's range and precision.
    return Sam3(freeze(model, device), processor, tokenizer, dtype, batch_size, name, revision)
