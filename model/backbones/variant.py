"""The frozen backbones of a model variant: one small JSON per variant beside this file, and its schema.

A `path` is a file or folder, absolute or relative to the repository root, or a hub id `owner/name`. A hub id needs
`revision`, the 40-hex commit that holds the weights: a branch or tag may move, and every computed number with it.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from runtime.errors import ModelError

ROOT = Path(__file__).resolve().parents[2]
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


class Spec(BaseModel):
    """Location of one backbone's weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1)
    """File or folder (absolute, or relative to the repository root), else a hub id; a local one takes precedence."""
    revision: str | None = None
    """Commit of the hub repository, 40 hex digits; required for a hub id."""

    @property
    def local(self) -> Path:
        """Local path that `path` stands for, whether or not it exists."""
        return ROOT / Path(self.path).expanduser()

    @property
    def is_hub_id(self) -> bool:
        """Whether `path` looks like `owner/name` rather than a path in weights/ or a weight file."""
        is_place = self.path.startswith("weights/") or self.path.endswith(WEIGHT_FILES)
        return HUB_ID.fullmatch(self.path) is not None and not is_place

    @field_validator("revision")
    @classmethod
    def revision_is_a_commit(cls, revision: str | None) -> str | None:
        if revision is not None and not re.fullmatch("[0-9a-f]{40}", revision):
            raise ValueError(
                f"'{revision}' is not a 40-hex commit; a branch or tag may move, so pin its current commit"
            )
        return revision

    @model_validator(mode="after")
    def hub_id_is_pinned(self) -> Self:
        if self.revision is None and self.is_hub_id and not self.local.exists():
            raise ValueError(f"'{self.path}' is not a local path, and a hub id needs `revision`, its 40-hex commit")
        return self


class DiffusionSpec(Spec):
    """A diffusers pipeline folder: StableDiffusionPipeline or StableDiffusionXLPipeline."""

    weights: Literal["fp16"] | None = None
    """`fp16` reads `*.fp16.safetensors`: half the download, no loss for a model that is frozen in half precision."""


class ClipSpec(Spec):
    """An open_clip folder: `open_clip_config.json` and `open_clip_model.safetensors`."""


class LayersSpec(Spec):
    """An image encoder of which some transformer blocks are read."""

    layers: tuple[int, ...] = Field(min_length=1)
    """Transformer blocks whose output is read, 0-based, ascending; of 32 blocks, 30 is the second to last."""

    @field_validator("layers")
    @classmethod
    def layers_ascend(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if layers[0] < 0 or any(low >= high for low, high in pairwise(layers)):
            raise ValueError(f"{list(layers)} must be 0-based blocks in ascending order, each once")
        return layers


class ImageEncoderSpec(LayersSpec):
    """The image encoder whose hidden states the multimodal feature injection encoder reads."""

    kind: Literal["clip", "siglip", "dino"] = "clip"
    """As of `TowerSpec`."""

    @model_serializer(mode="wrap")
    def without_default_kind(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The fields without `kind` if it is clip: digests of these are in tables made before there were kinds."""
        tree: dict[str, Any] = serialize(self)
        return {key: value for key, value in tree.items() if (key, value) != ("kind", "clip")}


class RecogniserSpec(Spec):
    """A face recogniser: a transformers folder of ViTModel, Dinov2Model or ResNetModel with its image processor and
    `identity.safetensors`, the Linear (weight, bias) that makes the last layer an ID vector."""

    pool: Literal["cls", "mean"] = "cls"
    """What is read of a block of a ViT: its class token, or the mean of its patch tokens [a reading]."""


class FaceSpec(RecogniserSpec, LayersSpec):
    """The face recogniser, a ViT, whose layers DreamIdentity reads beside the ID vector."""


class TowerSpec(Spec):
    """An image encoder of which some transformer blocks' patch tokens are read."""

    kind: Literal["clip", "siglip", "dino"]
    """clip: an open_clip folder; siglip (SigLIP, SigLIP 2) and dino (DINO, DINOv2, DINOv3): transformers
    folders."""
    block: int = Field(ge=0)
    """Block whose output is read of every view, 0-based: its `hidden_states[block + 1]`, without the final norm."""
    shallow: tuple[int, int, int]
    """Blocks whose output is read of the low view, for a projector with a structure branch."""


class DetailSpec(BaseModel):
    """Two image encoders that read a reference at two resolutions (RealCustom++), their tokens joined by channel.

    The reference is squeezed to a square of twice `side`. The low view is that square at half its side; the high views
    are its four parts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    towers: tuple[TowerSpec, TowerSpec]
    side: int = Field(gt=0)
    """Side of each view, pixels: what the towers read."""
    split: Literal["interleave", "tiles"] = "interleave"
    """How the high views divide the square: each the whole image at every second pixel, or each a quarter of it."""


class DinoSpec(Spec):
    """A transformers folder of DINO, DINOv2 or DINOv3 with its image processor."""


class DetectorSpec(Spec):
    """A transformers folder of Grounding DINO, MM-Grounding-DINO, LLMDet, or SAM 3, which segments too."""


class SamSpec(Spec):
    """A published SAM checkpoint, with its `size`, or a folder: of SAM (`SamConfig`), or of SAM 2 (transformers)."""

    size: Literal["vit_b", "vit_l", "vit_h"] | None = None
    """Size of the published checkpoint at `path`; None for a folder."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Digest of the checkpoint, checked before it is read."""


class LpipsSpec(Spec):
    """The network below LPIPS's linear layers: a file of torchvision's ImageNet weights."""

    net: Literal["alex", "vgg", "squeeze"]
    """AlexNet, which the LPIPS authors recommend for comparing images; VGG16; SqueezeNet 1.1."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Digest of the file, checked before it is read."""


class Variant(BaseModel):
    """One model variant: every frozen backbone it needs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    resolution: int = Field(gt=0)
    """Side of the square images that the diffusion model generates, pixels."""
    diffusion: DiffusionSpec
    image_encoder: ImageEncoderSpec
    """Its hidden states feed the visual and textual Q-Formers."""
    detail: DetailSpec | None = None
    """What RealCustom++ reads instead; None: the method is unavailable."""
    face: FaceSpec | None = None
    """What DreamIdentity reads instead; as `detail`."""
    face_metric: RecogniserSpec | None = None
    """Face recogniser of the metric `face_i`, another than `face`; None: the metric is unavailable."""
    clip: ClipSpec
    """Its embeddings give the similarity matrix, CLIP-I and CLIP-T."""
    dino: DinoSpec
    """Its embeddings give DINO-I."""
    detector: DetectorSpec
    sam: SamSpec
    reward: Spec | None = None
    """Model of the metric `reward`; None: the metric is unavailable."""
    lpips: LpipsSpec | None = None
    """As `reward`, for the metric `lpips`."""

    @model_validator(mode="after")
    def faces_are_measured_by_another(self) -> Self:
        face, metric = self.face, self.face_metric
        if face is not None and metric is not None and (face.path, face.revision) == (metric.path, metric.revision):
            raise ValueError(f"face and face_metric are both '{face.path}'; measure with another than is trained on")
        return self


def load_variant(name: str) -> Variant:
    """Read `model/backbones/<name>.json`, or the JSON file at the path `name` when it ends in `.json`.

    Raises ModelError, one sentence, for an unknown name, a file that is not JSON, an unknown, missing or wrong key, and
    a hub id without a pinned revision.
    """
    file = Path(name).expanduser() if name.endswith(".json") else Path(__file__).parent / f"{name}.json"
    try:
        tree: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(path.stem for path in Path(__file__).parent.glob("*.json")))
        raise ModelError(f"unknown variant '{name}'; choose one of {known}, or give the path of a JSON file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file.name}: not readable as JSON ({error}); correct or replace it") from error
    try:
        return Variant.model_validate(tree)
    except ValidationError as error:
        raise ModelError(f"{file.name}: {first_fault(error)}") from error


def variant_of(base_model: str) -> Variant | None:
    """The variant beside this file whose base model is `base_model`, or None if there is none."""
    variants = (load_variant(path.stem) for path in sorted(Path(__file__).parent.glob("*.json")))
    return next((variant for variant in variants if variant.diffusion.path == base_model), None)


def first_fault(error: ValidationError) -> str:
    """The first fault pydantic found, as `key: what is wrong`."""
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    what = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what
