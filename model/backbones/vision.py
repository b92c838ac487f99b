"""Image encoders of transformers: DINO (Caron et al. 2021), DINOv2 (Oquab et al. 2023) and DINOv3 (Siméoni et al. 2025)
for DINO-I, SigLIP (Zhai et al. 2023) and SigLIP 2 (Tschannen et al. 2025) for similarity between subjects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ConvNextModel,
    DINOv3ViTModel,
    Siglip2VisionModel,
    SiglipVisionModel,
    ViTModel,
)

from model.backbones.frozen import fixed_batches, freeze, normalised, require_layers
from model.backbones.hub import from_pretrained, identify, model_type, reading, resolve
from model.backbones.variant import Spec
from runtime.errors import ModelError

# A pooling layer and a classifier read the class token after the norm, which is the embedding.
HEADS = ("pooler\\.", "classifier\\.")
DINO: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (ViTModel, {"add_pooling_layer": False}),
    "dinov2": (Dinov2Model, {}),
    "dinov2_with_registers": (Dinov2WithRegistersModel, {}),
    "dinov3_vit": (DINOv3ViTModel, {}),
    "dinov3_convnext": (DINOv3ConvNextModel, {}),
}
"""By `model_type` of a folder's config.json: the class and its options; `vit` is DINO."""

SIGLIP = {
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "siglip2": Siglip2VisionModel,
    "siglip2_vision_model": Siglip2VisionModel,
}
"""By `model_type` of a folder with both towers, or with the image tower alone: the class. `siglip2` is NaFlex; a SigLIP
2 of fixed size is published as a `siglip`."""
OTHER_TOWER = ("text_model\\.", "logit_scale$", "logit_bias$", "head\\.")
"""Weights of both towers' folder that are not the image tower's; `head` without `vision_use_head` is refused later."""
SETTINGS = ["config.json", "preprocessor_config.json", "processor_config.json"]
SQUARE = Image.new("RGB", (64, 64))
"""Stands for any square photo."""


@dataclass(frozen=True)
class Vision:
    """A frozen image encoder; its results are float32 on the model's device."""

    model: Any
    processor: Any
    preprocess: Callable[[Image.Image], Tensor]
    """The checkpoint's own resize, crop and normalisation: a photo to [3, h, w]; runs on the CPU, so threads can do
    it."""
    embedding: Literal["class_token", "pooler_output"]
    """Embedding of the whole image: the first token after the final norm (of a ConvNeXt the mean of all places), or a
    pooling head's output over all."""
    batch_size: int
    name: str
    """`<hub id or path>@<12 digits of the revision>`: the encoder id in tables."""
    revision: str

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings [B, d]."""
        config = self.model.config
        width = config.hidden_sizes[-1] if isinstance(self.model, DINOv3ConvNextModel) else config.hidden_size
        rows = [torch.zeros(0, width, device=self.device)]
        for batch, count in fixed_batches(images, self.batch_size):
            found = self.forward([self.preprocess(image) for image in batch])
            whole = found.last_hidden_state[:, 0] if self.embedding == "class_token" else found.pooler_output
            rows.append(F.normalize(whole.float(), dim=-1)[:count])
        return torch.cat(rows)

    @torch.no_grad()
    def hidden_states(self, images: Sequence[Image.Image], layers: Sequence[int]) -> Tensor:
        """Output of the transformer blocks `layers` (0-based, ascending) [B, K, N, d], without a final norm: the class
        token if there is one, then the patches.

        Raises ModelError for layers the encoder lacks, a ConvNeXt, and photos of several shapes for NaFlex.
        """
        blocks = getattr(self.model.config, "num_hidden_layers", None)
        if blocks is None:
            raise ModelError(f"{self.name}: hidden states need a transformer; choose another image encoder")
        require_layers(layers, blocks, self.name)
        rows, shapes = [], set()
        for batch, count in fixed_batches(images, self.batch_size):
            pixels = [self.preprocess(image) for image in batch]
            shapes |= {photo.shape for photo in pixels}
            if len(shapes) > 1:
                raise ModelError(f"{self.name}: hidden states need photos of one shape; place subjects on squares")
            rows.append(self.states(pixels, layers)[:count])
        return torch.cat(rows) if rows else self.states([self.read(self.processor, SQUARE)], layers)[:0]

    @torch.no_grad()
    def patch_states(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        """Patch tokens after the transformer blocks `blocks` (0-based) [B, K, N, d], without a final norm.

        images: [B, 3, s, s] in 0..1, of the side that the encoder reads; some read any (`reads_any_size`).
        """
        pixels = normalised(images, self.processor.image_mean, self.processor.image_std)
        return self.states(list(pixels), blocks)[:, :, self.first :]

    def states(self, photos: list[Tensor], blocks: Sequence[int]) -> Tensor:
        """As `hidden_states`, for preprocessed photos of one size."""
        found = self.forward(photos, output_hidden_states=True).hidden_states
        # Registers, from DINOv2 on, are between class token and patches; NaFlex's padding follows the patches.
        begin = self.first + getattr(self.model.config, "num_register_tokens", 0)
        tokens = [*range(self.first), *range(begin, begin + self.patches(photos[0]))]
        return torch.stack([found[block + 1][:, tokens] for block in blocks], dim=1).float()

    def patches(self, photo: Tensor) -> int:
        """Patches of a preprocessed photo [3, h, w]."""
        side: int = self.model.config.patch_size
        return (photo.shape[-2] // side) * (photo.shape[-1] // side)

    @property
    def first(self) -> int:
        """Tokens that precede the patches in `hidden_states`."""
        return int(self.embedding == "class_token")

    @staticmethod
    def read(processor: Any, image: Image.Image) -> Tensor:
        """`preprocess` of a checkpoint's image processor."""
        # One at a time: the processor resizes photos of equal size as a batch.
        pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def forward(self, photos: list[Tensor], **options: Any) -> Any:
        """The model's output for preprocessed photos."""
        return self.model(torch.stack(photos).to(self.device, self.model.dtype), **options)

    @property
    def reads_any_size(self) -> bool:
        """Whether the model interpolates its positions to the size of an image."""
        return not hasattr(self.model.config, "image_size") or self.model.config.model_type.startswith("dinov")

    @property
    def device(self) -> torch.device:
        found: torch.device = self.model.device
        return found


@dataclass(frozen=True)
class FlexibleVision(Vision):
    """A SigLIP 2 NaFlex: it keeps a photo's proportions, and sees at most `max_num_patches` patches of it."""

    @staticmethod
    def read(processor: Any, image: Image.Image) -> Tensor:
        """As of `Vision`; both sides are multiples of a patch."""
        out, patch = processor(images=image, return_tensors="pt"), processor.patch_size
        height, width = out["spatial_shapes"][0].tolist()
        patches = out["pixel_values"][0, : height * width].view(height, width, patch, patch, 3)
        pixels: Tensor = patches.permute(4, 0, 2, 1, 3).reshape(3, height * patch, width * patch)
        return pixels

    def forward(self, photos: list[Tensor], **options: Any) -> Any:
        """The model's output for photos [3, h, w] of any sizes that are multiples of a patch, or lose the rest."""
        rows = [to_patches(photo, self.model.config.patch_size) for photo in photos]
        # One patch of padding in every row: transformers drops a mask without any, so a batch of full rows would run
        # another attention kernel, and a photo's rounding depend on the others in its batch.
        length = 1 + max(self.processor.max_num_patches, *(len(row) for row, _ in rows))
        padded = torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row, _ in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in rows])
        return self.model(
            pixel_values=padded.to(self.device, self.model.dtype),
            pixel_attention_mask=mask.to(self.device),
            spatial_shapes=torch.tensor([shape for _, shape in rows]),
            **options,
        )


def load_dino(
    spec: Spec, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 32
) -> Vision:
    """The frozen DINO, DINOv2 or DINOv3 of `spec`, computing in `dtype`.

    The folder's config.json determines which (`facebook/dino-vits16`, `facebook/dinov2-base`,
    `facebook/dinov3-vitb16-pretrain-lvd1689m`). Raises ModelError if it is missing or invalid.
    """
    folder = fetch(spec)
    what = "a transformers folder of DINO, DINOv2 or DINOv3"
    with reading(spec.path, what):
        if (found := model_type(folder)) not in DINO:
            raise ValueError(f"its model_type is {found}")
    kind, options = DINO[found]
    model = from_pretrained(kind, folder, spec.path, what, unread=HEADS, dtype=dtype, **options)
    return vision(model, spec, folder, what, "class_token", device, batch_size)


def load_siglip(
    spec: Spec, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 32
) -> Vision:
    """The frozen image tower of the SigLIP or SigLIP 2 of `spec`, computing in `dtype`.

    The folder is a transformers checkpoint with both towers or the image tower alone, of fixed size
    (`google/siglip-so400m-patch14-384`, `google/siglip2-base-patch16-256`) or NaFlex
    (`google/siglip2-base-patch16-naflex`). Raises ModelError if it is missing or invalid.
    """
    folder = fetch(spec)
    what = "a transformers folder of SigLIP"
    with reading(spec.path, what):
        if (found := model_type(folder)) not in SIGLIP:
            raise ValueError(f"its model_type is {found}")
    model = from_pretrained(SIGLIP[found], folder, spec.path, what, tuple(SIGLIP), OTHER_TOWER, dtype=dtype)
    if not model.use_head:
        raise ModelError(f"{spec.path}: this SigLIP has no pooling head, and so no image embedding; choose another")
    return vision(model, spec, folder, what, "pooler_output", device, batch_size)


def fetch(spec: Spec) -> Path:
    """The local folder of `spec`."""
    return resolve(spec, [*SETTINGS, "model*.safetensors", "model*.json"])


def vision(
    model: Any,
    spec: Spec,
    folder: Path,
    what: str,
    embedding: Literal["class_token", "pooler_output"],
    device: str | torch.device,
    batch_size: int,
) -> Vision:
    """A loaded model with the processor beside it."""
    with reading(spec.path, what):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    name, revision = identify(spec, folder.glob("*.safetensors"))
    kind = FlexibleVision if isinstance(model, Siglip2VisionModel) else Vision
    preprocess, name = partial(kind.read, processor), f"{name}@{revision[:12]}"
    return kind(freeze(model, device), processor, preprocess, embedding, batch_size, name, revision)


def vision_size(spec: Spec) -> tuple[int, int, int]:
    """Tokens that precede the patches, patches of a square photo, and their width; from the configurations alone."""
    folder = resolve(spec, SETTINGS)
    with reading(spec.path, "a transformers folder with config.json and preprocessor_config.json"):
        config, processor = image_config(folder), AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        is_siglip = config.model_type in SIGLIP
        kind = FlexibleVision if SIGLIP.get(config.model_type) is Siglip2VisionModel else Vision
        height, width = kind.read(processor, SQUARE).shape[-2:]
        return int(not is_siglip), (height // config.patch_size) * (width // config.patch_size), config.hidden_size


def image_config(folder: Path) -> Any:
    """The configuration of the image tower in a transformers folder."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return getattr(config, "vision_config", config)


def to_patches(photo: Tensor, patch: int) -> tuple[Tensor, tuple[int, int]]:
    """A photo [3, h, w] as rows [n, patch * patch * 3] and the number of them in each direction; a rest is lost."""
    height, width = photo.shape[-2] // patch, photo.shape[-1] // patch
    grid = photo[:, : height * patch, : width * patch].reshape(3, height, patch, width, patch)
    return grid.permute(1, 3, 2, 4, 0).reshape(height * width, -1), (height, width)
