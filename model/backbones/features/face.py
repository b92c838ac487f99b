"""A face recogniser whose layers are read: a ViT, and the Linear that makes an ID vector of its last layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, Dinov2Model, ResNetModel, ViTModel

from model.backbones.frozen import fixed_batches, freeze
from model.backbones.hub import from_pretrained, identify, model_type, reading, require_weights, resolve
from model.backbones.variant import FaceSpec, RecogniserSpec, Spec
from runtime.errors import ModelError

WHOLE, PIXELS = (0,), (0, 1, 2)
"""Places on the features' K axis: what a frozen recogniser reads of a face, or the channels of the face itself, for an
adapter that trains the recogniser."""
IDENTITY = "identity.safetensors"
"""File of the Linear, beside the checkpoint."""
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (ViTModel, {"add_pooling_layer": False}),
    "dinov2": (Dinov2Model, {}),
    "resnet": (ResNetModel, {}),
}
"""By `model_type`: the class and its options. A ResNet has no tokens, and gives an ID vector only."""
UNREAD = ("pooler\\.", "classifier\\.")
"""Weights of a published checkpoint that no result depends on."""
STILL = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
"""Settings of a network that are 0 here: what a step's losses depend on is drawn by the sampler alone."""
WHAT = "a transformers folder of a face recogniser"


class FaceRecogniser(nn.Module):
    """v = [token of each of `layers` ; ID vector], joined by channel; the ID vector is a Linear of the last layer."""

    def __init__(self, network: Any, identity_width: int, layers: Sequence[int] = (), pool: str = "cls") -> None:
        """`network`: of KINDS; `layers`, `pool`: as in `FaceSpec`."""
        super().__init__()
        self.network, self.layers, self.pool = network, tuple(layers), pool
        self.identity = nn.Linear(width_of(network.config), identity_width)

    @classmethod
    def of(
        cls, config: Mapping[str, Any], identity_width: int, layers: Sequence[int] = (), pool: str = "cls"
    ) -> FaceRecogniser:
        """With new weights, of a network's config.json."""
        kind, options = KINDS[config["model_type"]]
        network = kind(settings_of({**config, **{name: 0.0 for name in STILL if name in config}}), **options)
        if config["model_type"] == "dinov2":
            network.embeddings.mask_token = None  # of pretraining alone: it would be a weight without a gradient
        return cls(network, identity_width, layers, pool)

    @property
    def width(self) -> int:
        """Columns of v."""
        return len(self.layers) * width_of(self.network.config) + self.identity.out_features

    def forward(self, faces: Tensor) -> Tensor:
        """Faces [B, 3, s, s] as the recogniser's processor gives them -> v [B, len(layers) d + e]."""
        out = self.network(faces.to(self.identity.weight.dtype), output_hidden_states=bool(self.layers))
        parts = [self.token(out.hidden_states[layer + 1]) for layer in self.layers]
        last = out.pooler_output.flatten(1) if out.last_hidden_state.ndim == 4 else self.token(out.last_hidden_state)
        return torch.cat([*parts, self.identity(last)], dim=-1)

    def token(self, states: Tensor) -> Tensor:
        """[B, 1 + patches, d] -> [B, d]."""
        return states[:, 0] if self.pool == "cls" else states[:, 1:].mean(dim=1)


@dataclass(frozen=True)
class Faces:
    """A frozen face recogniser, or its preprocessing alone. Results are float32 on its device."""

    net: FaceRecogniser | None
    """None: faces are handed on as they are, to an adapter with a recogniser of its own."""
    preprocess: Callable[[Image.Image], Tensor]
    """A photo to the recogniser's input [3, s, s]."""
    batch_size: int
    name: str
    device: torch.device

    @torch.no_grad()
    def hidden_states(self, images: Sequence[Image.Image], layers: Sequence[int]) -> Tensor:
        """Features [B, K, N, d] of photos: v [B, 1, 1, d], or the input itself [B, 3, s, s].

        Raises ModelError if `layers` are not these places on the K axis.
        """
        wanted = PIXELS if self.net is None else WHOLE
        if tuple(layers) != wanted:
            raise ModelError(f"{self.name}: layers {list(layers)} were asked for; it has {list(wanted)}")
        rows = [self.states(batch)[:count] for batch, count in fixed_batches(images, self.batch_size)]
        # Of no image the widths are those of a white one.
        return torch.cat(rows) if rows else self.states([Image.new("RGB", (1, 1), "white")])[:0]

    def states(self, images: Sequence[Image.Image]) -> Tensor:
        """`hidden_states` of one batch."""
        faces = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        return faces.float() if self.net is None else self.net(faces).float()[:, None, None]

    @torch.no_grad()
    def embed(self, faces: Sequence[Tensor]) -> Tensor:
        """Unit ID vectors [B, e] of preprocessed photos, of a recogniser without `layers`."""
        assert self.net is not None
        rows = [torch.zeros(0, self.net.identity.out_features, device=self.device)]
        for batch, count in fixed_batches(faces, self.batch_size):
            rows.append(F.normalize(self.net(torch.stack(batch).to(self.device)).float(), dim=-1)[:count])
        return torch.cat(rows)


def load_faces(
    spec: Spec,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
    pixels: bool = False,
) -> Faces:
    """The frozen recogniser of `spec`, computing in `dtype`; `pixels`: its preprocessing alone.

    Raises ModelError if the folder is missing or of another kind, or a block does not exist.
    """
    folder = fetch(spec)
    processor = load_processor(folder, spec)
    net = None if pixels else freeze(load_recogniser(spec, dtype), device)
    name, revision = identify(spec, folder.glob("*.safetensors"))
    return Faces(net, processor, batch_size, faces_name(f"{name}@{revision[:12]}", spec, pixels), torch.device(device))


def load_recogniser(spec: Spec, dtype: torch.dtype = torch.float32) -> FaceRecogniser:
    """The recogniser of `spec` with its weights, on the CPU; raises ModelError as `load_faces`."""
    folder = fetch(spec)
    config = network_config(folder, spec)
    kind, options = KINDS[config["model_type"]]
    net = FaceRecogniser.of(config, identity_width(folder, spec), *reads(spec))
    loaded = from_pretrained(kind, folder, spec.path, WHAT, tuple(KINDS), UNREAD, **options)
    with reading(spec.path, WHAT):
        own = net.network.state_dict()
        net.network.load_state_dict({name: value for name, value in loaded.state_dict().items() if name in own})
        state = load_file(folder / IDENTITY)
        require_weights(net.identity.state_dict(), state)
        net.identity.load_state_dict(state)
    return net.to(dtype)


def load_processor(folder: Path, spec: Spec) -> Callable[[Image.Image], Tensor]:
    """The checkpoint's own resize, crop and normalisation, one photo at a time; raises ModelError unless it gives the
    squares that the network reads."""
    with reading(spec.path, WHAT):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        side = face_side(network_config(folder, spec))  # a convolutional network reads any

    def preprocess(image: Image.Image) -> Tensor:
        pixels: Tensor = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return pixels

    found = tuple(preprocess(Image.new("RGB", (7, 5), "white")).shape)
    wanted = found[-1] if side is None else side
    if found != (3, wanted, wanted):
        raise ModelError(
            f"{spec.path}: its image processor gives {found}, but the network reads (3, {wanted}, {wanted}); correct"
            " preprocessor_config.json"
        )
    return preprocess


def fetch(spec: Spec) -> Path:
    """The local folder of `spec`."""
    return resolve(spec, ["config.json", "preprocessor_config.json", "model*.safetensors", "model*.json", IDENTITY])


def reads(spec: Spec) -> tuple[tuple[int, ...], str]:
    """Layers and pooling of `spec`, by default none, for an ID vector alone, and the class token's."""
    return spec.layers if isinstance(spec, FaceSpec) else (), spec.pool if isinstance(spec, RecogniserSpec) else "cls"


def without_layers(spec: Spec) -> Spec:
    """`spec` for the ID vector alone."""
    return RecogniserSpec.model_validate({"path": spec.path, "revision": spec.revision, "pool": reads(spec)[1]})


def network_config(folder: Path, spec: Spec) -> dict[str, Any]:
    """config.json of the network; raises ModelError for another kind, and for blocks that it does not have."""
    with reading(spec.path, WHAT):
        if (found := model_type(folder)) not in KINDS:
            raise ValueError(f"its model_type is {found}")
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers, _ = reads(spec)
    blocks = getattr(settings_of(config), "num_hidden_layers", 0)
    if layers and layers[-1] >= blocks:
        raise ModelError(f"{spec.path}: block {layers[-1]} is beyond its blocks 0..{blocks - 1}")
    return {name: value for name, value in config.items() if name not in ("architectures", "transformers_version")}


def settings_of(config: Mapping[str, Any]) -> Any:
    """A network's config.json as transformers' object."""
    return AutoConfig.for_model(**config)


def width_of(settings: Any) -> int:
    """Width d of a network's last layer."""
    return int(settings.hidden_sizes[-1] if hasattr(settings, "hidden_sizes") else settings.hidden_size)


def face_side(config: Mapping[str, Any]) -> int | None:
    """Side of the faces that a network reads, pixels; None: any."""
    return getattr(settings_of(config), "image_size", None)


def identity_width(folder: Path, spec: Spec) -> int:
    """Width e of the ID vector, without reading the weights."""
    with reading(f"{spec.path}/{IDENTITY}", "the Linear of an ID vector"), safe_open(folder / IDENTITY, "pt") as file:
        return int(file.get_slice("weight").get_shape()[0])


def describe_net(spec: FaceSpec) -> dict[str, Any]:
    """What `FaceRecogniser.of` needs to build the recogniser without its weights, JSON-like; raises ModelError as
    `load_faces`."""
    folder = fetch(spec)
    config = network_config(folder, spec)
    return {
        "config": config,
        "identity_width": identity_width(folder, spec),
        "layers": list(spec.layers),
        "pool": spec.pool,
    }


def faces_size(spec: FaceSpec, pixels: bool) -> tuple[int, int, int]:
    """K, N, d of a photo's features, from the configurations alone."""
    found = describe_net(spec)
    settings = settings_of(found["config"])
    if pixels:
        return 3, settings.image_size, settings.image_size
    return 1, 1, len(spec.layers) * width_of(settings) + found["identity_width"]


def faces_name(name: str, spec: Spec, pixels: bool) -> str:
    """The name of what is read of the recogniser called `name`."""
    layers, pool = reads(spec)
    return f"{name} ({' '.join(map(str, layers))}; {pool}{'; trained' if pixels else ''})" if layers else name
