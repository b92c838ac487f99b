"""SAM 2 and 2.1 (Ravi et al. 2024) of transformers on single photos, prompted with a box or points.

On disk: a transformers folder of Sam2Model, or of Sam2VideoModel as `facebook/sam2.1-hiera-large` is published, of
which `video_sam` reads the weights that only a video needs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model

from model.backbones.frozen import freeze, normalised
from model.backbones.hub import from_pretrained, identify, reading, resolve
from model.backbones.segmenters.segmenter import (
    Box,
    EmbeddedPhoto,
    PromptPoint,
    Segmenter,
    is_ambiguous,
    require_digest,
)
from model.backbones.variant import SamSpec

TYPES = ("sam2", "sam2_video")
"""Model types of a folder for photos, or for videos."""
FILES = ["config.json", "preprocessor_config.json", "processor_config.json", "model*.safetensors", "model*.json"]


@dataclass(frozen=True)
class Sam2Segmenter(Segmenter):
    """A frozen SAM 2; steps and arithmetic are those of `transformers.Sam2Processor` and `Sam2Model`."""

    model: Sam2Model
    processor: Sam2ImageProcessor

    def prepare(self, image: Image.Image) -> Tensor:
        """The photo squeezed to the encoder's square, uint8 [3, s, s]; on the CPU, for threads."""
        # Normalised on the device: float32 would take four times the memory while it waits.
        out = self.processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt")
        pixels: Tensor = out["pixel_values"][0]
        return pixels

    @torch.no_grad()
    def encode(self, photos: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Features at strides 4, 8 and 16 of each output of `prepare`."""
        fine, middle, coarse = self.encoder_output(torch.stack(list(photos))).fpn_hidden_states
        maps = (
            self.model.mask_decoder.conv_s0(fine),
            self.model.mask_decoder.conv_s1(middle),
            coarse + self.model.no_memory_embedding.view(1, -1, 1, 1),  # a photo has no frame before it
        )
        return list(zip(*maps, strict=True))

    @torch.no_grad()
    def encoder_output(self, photos: Tensor) -> Any:
        """What the image encoder makes of outputs of `prepare` [B, 3, s, s], its feature maps as float32."""
        pixels = photos.to(self.model.device).float() * self.processor.rescale_factor
        pixels = normalised(pixels, self.processor.image_mean, self.processor.image_std)
        dtype = next(self.model.vision_encoder.parameters()).dtype
        out = self.model.vision_encoder(pixels.to(dtype))
        for name in ("fpn_hidden_states", "fpn_position_encoding"):
            out[name] = tuple(x.float() for x in out[name])
        return out

    def decode(
        self, photo: EmbeddedPhoto, box: Box | None, points: Sequence[PromptPoint] = ()
    ) -> tuple[Tensor, Tensor]:
        """See `Segmenter.decode`."""
        device = self.model.device
        scale = torch.tensor(photo.scale, device=device)
        prompt: dict[str, Tensor] = {}
        if box is not None:
            corners = torch.tensor(box, dtype=torch.float32, device=device) * scale.repeat(2)
            prompt["input_boxes"] = corners[None, None]
        if points:
            places = torch.tensor([[x, y] for x, y, _ in points], dtype=torch.float32, device=device) * scale
            prompt["input_points"] = places[None, None]
            prompt["input_labels"] = torch.tensor([[[int(on_subject) for *_, on_subject in points]]], device=device)
        ambiguous = is_ambiguous(box, points)
        out = self.model(image_embeddings=[x[None] for x in photo.features], multimask_output=ambiguous, **prompt)
        masks, scores = out.pred_masks[0], out.iou_scores[0, 0]  # [1, M, h, w] and [M]
        best = int(scores.argmax()) if ambiguous else 0
        logits = F.interpolate(masks[:, best : best + 1], photo.full, mode="bilinear", align_corners=False)
        return logits[0, 0] > 0, scores[best]


def load_sam2(
    spec: SamSpec, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 8
) -> Sam2Segmenter:
    """The frozen SAM 2 of `spec`; its image encoder runs in `dtype`, its prompt encoder and mask decoder in float32.

    Raises ModelError if files are missing, of another model, or do not have the variant's digest.
    """
    folder = resolve(spec, FILES)
    weights = sorted(folder.glob("*.safetensors"))
    require_digest(spec, weights)
    what = "a transformers folder of SAM 2"
    with reading(spec.path, what):
        # Read as it is: transformers would warn of a folder for videos.
        config = Sam2Config.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model = from_pretrained(Sam2Model, folder, spec.path, what, TYPES, config=config, dtype=torch.float32)
    with reading(spec.path, what):
        processor = Sam2ImageProcessor.from_pretrained(folder, local_files_only=True)
    name, revision = identify(spec, weights)
    freeze(model, device).vision_encoder.to(dtype)
    return Sam2Segmenter(model, batch_size, name, revision, processor)
