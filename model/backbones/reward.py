"""ImageReward (Xu et al. 2023): how well an image matches its prompt, learned from human rankings.

A BLIP text encoder (Li et al. 2022) reads the prompt and attends to the image's tokens through cross-attention; an MLP
maps its first token to one number. Built on transformers' BLIP, as the published package needs an old transformers.

On disk: the published files (`ImageReward.pt`, a state dict, and `med_config.json`), or a folder with `config.json`
(the fields of `RewardConfig`), `model.safetensors` and a BERT tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from model.backbones.frozen import fixed_batches, freeze
from model.backbones.hub import identify, reading, require_vocabulary, require_weights, resolve
from model.backbones.variant import Spec
from runtime.errors import ModelError

PUBLISHED = Spec(path="zai-org/ImageReward", revision="5736be03b2652728fb87788c9797b0570450ab72")
"""ImageReward v1.0; the repository was THUDM/ImageReward before it moved."""

TOKENIZER = Spec(path="google-bert/bert-base-uncased", revision="86b5e0934494bd15c9632b12f734a8a67f723594")
"""Tokenizer of the published checkpoint, whose own repository has none."""

CHECKPOINT, MED_CONFIG = "ImageReward.pt", "med_config.json"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
VOCABULARY = ("vocab.txt", "tokenizer.json", "tokenizer_config.json")

# CLIP's channel means and deviations in 0..1, which BLIP shares.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

PUBLISHED_NAMES: dict[str, str] = {
    r"blip\.visual_encoder\.cls_token$": "vision.embeddings.class_embedding",
    r"blip\.visual_encoder\.pos_embed$": "vision.embeddings.position_embedding",
    r"blip\.visual_encoder\.patch_embed\.proj\.": "vision.embeddings.patch_embedding.",
    r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.": r"vision.encoder.layers.\1.layer_norm\2.",
    r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.": r"vision.encoder.layers.\1.self_attn.qkv.",
    r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.": r"vision.encoder.layers.\1.self_attn.projection.",
    r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.": r"vision.encoder.layers.\1.mlp.",
    r"blip\.visual_encoder\.norm\.": "vision.post_layernorm.",
    r"blip\.text_encoder\.": "text.",
    r"mlp\.layers\.": "head.",
}
"""Prefixes of the published checkpoint's names, and their counterparts in `RewardModel`."""

IGNORED = r"blip\.(vision_proj|text_proj)\.|blip\.text_encoder\.embeddings\.position_ids$"
"""Published weights that the reward does not use: BLIP's contrastive projections and a buffer of 0, 1, 2, ..."""


class RewardConfig(BaseModel):
    """Sizes of one reward model. Defaults are those of ImageReward v1.0."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int
    """Side of the square input, pixels."""
    patch_size: int
    vision_layers: int
    vision_width: int
    vision_heads: int
    """Attention heads; divides vision_width."""
    vision_mlp: int
    """Hidden channels of the image encoder's MLPs."""
    vocabulary: int
    """Number of word embeddings."""
    text_layers: int
    text_width: int
    text_heads: int
    """Attention heads; divides text_width."""
    text_mlp: int
    positions: int = 512
    """Longest prompt that the text encoder has positions for, tokens."""
    length: int = 35
    """Tokens of a prompt, start and end included; longer prompts are truncated."""
    head: tuple[int, ...] = (1024, 128, 64, 16)
    """Widths of the MLP between the first token and the reward, without activations between them."""
    dropout: tuple[float, ...] = (0.2, 0.2, 0.1)
    """Dropout after the first layers of the MLP, in training."""
    mean: float = 0.16717362830052426
    std: float = Field(default=1.0333394966054072, gt=0)
    """Mean and std of the MLP's outputs over the training data: rewards are (output - mean) / std."""

    @model_validator(mode="after")
    def sizes_fit(self) -> Self:
        for whole, part in (
            ("image_size", "patch_size"),
            ("vision_width", "vision_heads"),
            ("text_width", "text_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{part} {getattr(self, part)} does not divide {whole} {getattr(self, whole)}")
        if self.length > self.positions:
            raise ValueError(f"length {self.length} exceeds the {self.positions} positions")
        if len(self.dropout) > len(self.head):
            raise ValueError(f"{len(self.dropout)} dropouts for {len(self.head)} hidden layers")
        return self


class RewardModel(nn.Module):
    """The network: image encoder, text encoder with cross-attention, MLP."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__()
        self.config = config
        vision = BlipVisionConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_size=config.vision_width,
            intermediate_size=config.vision_mlp,
            num_hidden_layers=config.vision_layers,
            num_attention_heads=config.vision_heads,
            layer_norm_eps=1e-6,  # as in BLIP's own ViT; transformers' default differs
            initializer_range=0.02,  # the default is almost zero
        )
        text = BlipTextConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.text_width,
            encoder_hidden_size=config.vision_width,
            intermediate_size=config.text_mlp,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            max_position_embeddings=config.positions,
            bos_token_id=None,  # both for generation only
            sep_token_id=None,
            is_decoder=True,  # builds the cross-attention; self-attention stays bidirectional
        )
        self.vision: Any = BlipVisionModel(vision)
        self.text: Any = BlipTextModel(text, add_pooling_layer=False)
        layers: list[nn.Module] = []
        width = config.text_width
        for index, wider in enumerate((*config.head, 1)):
            layers.append(nn.Linear(width, wider))
            if index < len(config.dropout):
                layers.append(nn.Dropout(config.dropout[index]))
            width = wider
        self.head = nn.Sequential(*layers)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Tokens [B, 1 + patches, vision_width] of normalised pixels [B, 3, image_size, image_size]."""
        tokens: Tensor = self.vision(pixels).last_hidden_state
        return tokens

    def reward(self, first: Tensor) -> Tensor:
        """Rewards [...], float32, from the states [..., text_width] of the prompts' first tokens."""
        output = self.head(first)[..., 0].float()
        return (output - self.config.mean) / self.config.std

    def forward(self, pixels: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Rewards [B] of pixels [B, 3, s, s] for the prompts `words` [B, L], `mask` 1 at real tokens."""
        tokens = self.encode_image(pixels)
        states = self.text(input_ids=words, attention_mask=mask, encoder_hidden_states=tokens).last_hidden_state
        return self.reward(states[:, 0])


@dataclass(frozen=True)
class Reward:
    """A frozen reward model."""

    model: RewardModel
    tokenizer: Any
    batch_size: int
    name: str
    """`<hub id or path>@<12 digits of the revision>`: the model's id in tables."""
    revision: str

    def score(self, images: Sequence[Image.Image] | NDArray[np.uint8] | Tensor, prompts: Sequence[str]) -> Tensor:
        """Rewards [N], float32, of each image for its prompt; any real number, higher is better.

        images: photos, or uint8 [N, H, W, 3], sRGB. They are resized, cropped and normalised here. Raises ModelError
        if the numbers of images and prompts differ.
        """
        if len(images) != len(prompts):
            raise ModelError(f"{len(images)} images and {len(prompts)} prompts; give one prompt per image")
        rewards = [torch.zeros(0, device=next(self.model.parameters()).device)]
        for rows, count in fixed_batches(range(len(prompts)), self.batch_size):
            pixels = [self.prepare(photo(images[row])) for row in rows]
            rewards.append(self.rate(pixels, [prompts[row] for row in rows])[:count])
        return torch.cat(rewards)

    def prepare(self, image: Image.Image) -> Tensor:
        """A photo as model input, [3, s, s]; runs on the CPU, so threads can do it."""
        return preprocess(self.model.config.image_size)(image)

    @torch.no_grad()
    def rate(self, photos: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """As `score`, for photos preprocessed by `prepare`."""
        device = next(self.model.parameters()).device
        rewards = [torch.zeros(0, device=device)]
        for rows, count in fixed_batches(range(len(prompts)), self.batch_size):
            tokens = self.tokenizer(
                [prompts[row] for row in rows],
                padding="max_length",
                truncation=True,
                max_length=self.model.config.length,
                return_tensors="pt",
            )
            pixels = torch.stack([photos[row] for row in rows])
            found = self.model(pixels.to(device), tokens["input_ids"].to(device), tokens["attention_mask"].to(device))
            rewards.append(found[:count])
        return torch.cat(rewards)


def photo(image: Image.Image | NDArray[np.uint8] | Tensor) -> Image.Image:
    """An RGB photo from a photo or from uint8 [H, W, 3]."""
    return (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).convert("RGB")


def preprocess(size: int) -> Callable[[Image.Image], Tensor]:
    """ImageReward's preprocessing: the shorter side to `size`, centre crop, CLIP's normalisation; [3, size, size]."""
    return Compose(
        [
            Resize(size, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(size),
            ToTensor(),
            Normalize(PIXEL_MEAN, PIXEL_STD),
        ]
    )


def load_reward(
    spec: Spec, device: str | torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 32
) -> Reward:
    """The frozen reward model of `spec`, computing in `dtype`; `PUBLISHED` is ImageReward v1.0.

    Raises ModelError if the folder is missing, incomplete, or holds weights of another model. A folder with the
    published files but no tokenizer uses that of `TOKENIZER`.
    """
    folder = resolve(spec, [CHECKPOINT, MED_CONFIG, CONFIG, WEIGHTS, *VOCABULARY])
    published = (folder / CHECKPOINT).is_file()
    what = f"a reward model ({CHECKPOINT} with {MED_CONFIG}, or {CONFIG} with {WEIGHTS})"
    with reading(spec.path, what):
        if published:
            file = folder / CHECKPOINT
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            config = published_config(json.loads((folder / MED_CONFIG).read_text()), state)
            state = renamed(state)
        else:
            file = folder / WEIGHTS
            config = RewardConfig.model_validate_json((folder / CONFIG).read_text())
            state = load_file(file)
        model = RewardModel(config).to(dtype)
        fill(model, state)
        words = folder if any((folder / name).is_file() for name in VOCABULARY[:2]) or not published else None
    hint = f"put its vocab.txt beside {CHECKPOINT}"
    words = words or resolve(TOKENIZER, list(VOCABULARY), hint)
    with reading(spec.path, what):
        require_vocabulary(words)
        tokenizer = BertTokenizer.from_pretrained(words, local_files_only=True)
    name, revision = identify(spec, [file])
    return Reward(freeze(model, device), tokenizer, batch_size, f"{name}@{revision[:12]}", revision)


def published_config(med: Mapping[str, Any], state: Mapping[str, Tensor]) -> RewardConfig:
    """Sizes of a published checkpoint: the text encoder's from its `med_config.json`, the others from tensor shapes."""
    width, _, patch, _ = state["blip.visual_encoder.patch_embed.proj.weight"].shape
    patches = state["blip.visual_encoder.pos_embed"].shape[1] - 1
    blocks = {key.split(".")[3] for key in state if key.startswith("blip.visual_encoder.blocks.")}
    linears = sorted((key for key in state if re.fullmatch(r"mlp\.layers\.\d+\.weight", key)), key=layer_of)
    return RewardConfig(
        image_size=patch * round(patches**0.5),
        patch_size=patch,
        vision_layers=len(blocks),
        vision_width=width,
        vision_heads=width // 64,  # in every ViT size that BLIP was published with
        vision_mlp=state["blip.visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        vocabulary=med["vocab_size"],
        text_layers=med["num_hidden_layers"],
        text_width=med["hidden_size"],
        text_heads=med["num_attention_heads"],
        text_mlp=med["intermediate_size"],
        positions=med["max_position_embeddings"],
        head=tuple(state[key].shape[0] for key in linears[:-1]),
    )


def layer_of(key: str) -> int:
    """The number in `mlp.layers.<number>.weight`."""
    return int(key.split(".")[2])


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under the names of `RewardModel`; raises ModelError for an unknown name."""
    found = {}
    for key, value in state.items():
        if re.match(IGNORED, key):
            continue
        pattern = next((pattern for pattern in PUBLISHED_NAMES if re.match(pattern, key)), None)
        if pattern is None:
            raise ModelError(
                f"{CHECKPOINT}: '{key}' is not a weight of ImageReward v1.0; download {PUBLISHED.path} again"
            )
        found[re.sub(f"^{pattern}", PUBLISHED_NAMES[pattern], key)] = value
    return found


def fill(model: RewardModel, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `model`; raises ValueError naming the first missing, unexpected or misshapen weight."""
    require_weights(model.state_dict(), state)
    model.load_state_dict(dict(state))


def save_config(config: RewardConfig, folder: Path) -> None:
    """Write the `config.json` that `load_reward` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(config.model_dump_json(indent=1) + "\n")
