"""The frozen image encoder of a method: which it is, what it gives, and how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from open_clip.model import CLIPVisionCfg
from PIL import Image
from pydantic import ConfigDict
from torch import Tensor

from model.backbones.clip import WEIGHTS, Clip, load_clip, transformer_sizes
from model.backbones.features.face import PIXELS, WHOLE, Faces, describe_net, faces_name, faces_size, load_faces
from model.backbones.features.towers import HIGH, LOW, SHALLOW, TwoTowers, load_towers, towers_name
from model.backbones.hub import identify, reading, resolve
from model.backbones.identity import spec_digest, weights_name
from model.backbones.variant import DetailSpec, FaceSpec, ImageEncoderSpec, Spec, TowerSpec, Variant
from model.backbones.vision import Vision, image_config, load_dino, load_siglip, vision_size
from runtime.digest import digest
from runtime.errors import ModelError
from runtime.params import Section

ImageEncoder = Clip | Vision | TwoTowers | Faces
"""All have `name`, `preprocess`, `batch_size` and `hidden_states(images, layers)` [B, K, N, d]."""

LOADERS: dict[str, Callable[..., Clip | Vision]] = {"clip": load_clip, "siglip": load_siglip, "dino": load_dino}

TWO_TOWERS, FACES = ("realcustom_pp",), ("dreamidentity",)
"""Methods that read the variant's `detail`, and those that read its `face`; all others read its `image_encoder`."""


class ViewParams(Section):
    """The keys of `model.projector` that say which views are read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    high: bool  # the four views of high resolution
    shallow: bool  # the shallow layers of the low view


class FaceReading(Section):
    """The key of `model.face` that says how faces are read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    train: str  # all: the adapter trains the recogniser, and reads faces themselves


class FeatureParams(Section):
    """The keys of section model that say which image encoder is read, and of it which views."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    encoder: str  # a method
    projector: ViewParams | None = None  # of two towers; null: the low and high views
    face: FaceReading | None = None  # of a face recogniser; null: as `all`

    def source(self, variant: Variant) -> FeatureSource:
        """The encoder in `variant`; ModelError if it has none for this method."""
        views = {} if self.projector is None else self.projector.model_dump()
        return feature_source(variant, self.encoder, **views, trained=self.face is None or self.face.train == "all")


@dataclass(frozen=True)
class FeatureSource:
    """A frozen image encoder, not loaded, and which of its hidden states are read."""

    spec: ImageEncoderSpec | DetailSpec | FaceSpec
    layers: tuple[int, ...]
    """Blocks of one encoder, or places on the K axis of `TwoTowers` or `Faces`."""

    def load(
        self, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 32
    ) -> ImageEncoder:
        """The frozen encoder, computing in `dtype`; ModelError if its weights are missing or of another kind."""
        if isinstance(self.spec, DetailSpec):
            return load_towers(self.spec, device, dtype, batch_size)
        if isinstance(self.spec, FaceSpec):
            return load_faces(self.spec, device, dtype, batch_size, self.layers == PIXELS)
        return LOADERS[self.spec.kind](self.spec, device, dtype, batch_size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """K, N, d of a photo's hidden states, from the configurations alone: nothing else is read or fetched.

        Raises:
            ModelError: a configuration is missing or invalid.
        """
        if isinstance(self.spec, DetailSpec):
            sizes = [tower_size(tower, self.spec.side) for tower in self.spec.towers]
            return len(self.layers), sizes[0][0], sum(width for _, width in sizes)
        if isinstance(self.spec, FaceSpec):
            return faces_size(self.spec, self.layers == PIXELS)
        first, patches, width = (clip_size if self.spec.kind == "clip" else vision_size)(self.spec)
        return len(self.layers), first + patches, width

    @property
    def network(self) -> dict[str, Any]:
        """A face recogniser's part of `AdapterConfig.face`; empty for the other encoders."""
        return describe_net(self.spec) if isinstance(self.spec, FaceSpec) else {}

    @property
    def name(self) -> str:
        """The loaded encoder's `name`, without loading it."""
        if isinstance(self.spec, DetailSpec):
            return towers_name([encoder_name(tower) for tower in self.spec.towers], self.spec)
        if isinstance(self.spec, FaceSpec):
            return faces_name(encoder_name(self.spec), self.spec, self.layers == PIXELS)
        return encoder_name(self.spec)

    @property
    def weights(self) -> str:
        """As `identity.weights_name`, of all weights and how they are used."""
        if isinstance(self.spec, DetailSpec):
            towers = "+".join(weights_name(tower) for tower in self.spec.towers)
            return f"{towers}, {self.spec.split} {self.spec.side} px"
        return weights_name(self.spec)

    @property
    def digest(self) -> str:
        """As `identity.spec_digest`, of all weights and how they are used."""
        if isinstance(self.spec, DetailSpec):
            towers = [spec_digest(tower) for tower in self.spec.towers]
            return digest(towers, self.spec.model_dump(), list(self.layers))
        if isinstance(self.spec, FaceSpec):
            return digest(spec_digest(self.spec), list(self.layers))
        return spec_digest(self.spec)

    def canvas(self, resolution: int) -> int:
        """Side of the square that a subject is placed on, px: `resolution`, or what the encoder reads if larger."""
        return max(resolution, 2 * self.spec.side) if isinstance(self.spec, DetailSpec) else resolution


def feature_source(
    variant: Variant, encoder: str, high: bool = True, shallow: bool = False, trained: bool = True
) -> FeatureSource:
    """What the method `encoder` reads; `high`, `shallow`: views of two towers beside the low one; `trained`: faces
    themselves, for an adapter that trains the recogniser.

    Raises:
        ModelError: the variant names no two towers, or no face recogniser.
    """
    if encoder in FACES:
        if variant.face is None:
            raise ModelError(
                f"variant '{variant.name}' has no 'face', the face recogniser of {encoder}; add it to its JSON, or name"
                " another with backbones.variant or --variant"
            )
        return FeatureSource(variant.face, PIXELS if trained else WHOLE)
    if encoder not in TWO_TOWERS:
        return FeatureSource(variant.image_encoder, variant.image_encoder.layers)
    if variant.detail is None:
        raise ModelError(
            f"variant '{variant.name}' has no 'detail', the two image towers of {encoder}; add it to its JSON"
        )
    return FeatureSource(variant.detail, LOW + HIGH * high + SHALLOW * shallow)


def adapter_source(variant: Variant, encoder: str, layers: Iterable[int]) -> FeatureSource:
    """What an adapter of the method `encoder` reads, which are the `layers` of its config; ModelError as
    `feature_source`."""
    return replace(feature_source(variant, encoder), layers=tuple(layers))


def black_features(encoder: ImageEncoder, layers: Iterable[int]) -> Tensor:
    """Hidden states [1, K, N, d] of a black image, which stands for none where a method keeps its visual branch."""
    return encoder.hidden_states([Image.new("RGB", (1, 1))], tuple(layers))


def tower_size(spec: TowerSpec, side: int) -> tuple[int, int]:
    """Patches of an image of `side` px, and their width."""
    if spec.kind == "clip":
        return clip_size(spec)[1:]
    folder = resolve(spec, ["config.json"])
    with reading(spec.path, "a transformers folder with config.json"):
        config = image_config(folder)
        return (side // config.patch_size) ** 2, config.hidden_size


def clip_size(spec: Spec) -> tuple[int, int, int]:
    """Tokens that precede the patches, patches of an image, and their width."""
    folder = resolve(spec, ["open_clip_config.json"])
    with reading(spec.path, "an open_clip folder with open_clip_config.json"):
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        vision = CLIPVisionCfg(**config["model_cfg"]["vision_cfg"])
        if vision.timm_model_name:
            with torch.device("meta"):
                tower = timm.create_model(vision.timm_model_name, pretrained=False)
            sizes = transformer_sizes(tower, spec.path)
            return sizes.first, sizes.patches, sizes.width
        patches = np.broadcast_to(vision.image_size, 2) // np.broadcast_to(vision.patch_size, 2)
        return 1, int(np.prod(patches)), vision.width


def encoder_name(spec: TowerSpec | ImageEncoderSpec | FaceSpec) -> str:
    """The `name` of a `Clip`, else of a `Vision` or of `Faces`, without loading it."""
    is_clip = not isinstance(spec, FaceSpec) and spec.kind == "clip"
    with reading(spec.path, f"an open_clip folder with {WEIGHTS}" if is_clip else "a transformers folder"):
        files: Iterable[Path] = [spec.local / WEIGHTS] if is_clip else spec.local.glob("*.safetensors")
        name, revision = identify(spec, files)
    return f"{name}@{revision[:12]}"
