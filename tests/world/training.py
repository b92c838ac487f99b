"""A tiny Stable Diffusion folder with random weights, and training tables as the data stages would write them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from pipelines import tables
from pipelines.similarity.tiles import tiles
from pipelines.similarity.worker import SimilarityParams
from runtime.params import Params
from tests.world import tables as rows

CHANNELS, SIDE = 4, 8
LAYERS, TOKENS, WIDTH = 2, 5, 24
AUGMENTATIONS = 3
NONE = {"subjects": 0}
NOUNS = ("mug", "teddy bear", "dog", "can")


@dataclass(frozen=True)
class World:
    """Tables in `data`, and for checking what training makes of them the embeddings behind the tiles."""

    data: Path
    subject_ids: list[str]
    vectors: np.ndarray


def write_world(
    data: Path, *, views: int = 20, single: int = 4, not_encoded: str | None = None, group_size: int = 4096
) -> World:
    """Tables of `views` subjects with 4 photos and 3 triplets each and `single` subjects with one photo and triplet."""
    rng = np.random.default_rng(0)
    frames, triplets = [], []
    ids = [f"turn/{n % 4}/s{n:02d}" for n in range(views)] + [f"one/train/p{n}" for n in range(single)]
    for number, subject in enumerate(ids):
        photos = [f"{subject}/{k}" for k in range(4 if number < views else 1)]
        noun = NOUNS[number % 4]
        frames += [frame(photo, subject, noun) for photo in photos]
        for index in range(3 if len(photos) > 1 else 1):
            three = [photos[(index + k) % len(photos)] for k in range(3)]
            triplets.append(triplet(subject, index, noun, three, "pose" if len(photos) > 1 else "augment"))
    encoded = [row["frame_id"] for row in frames if row["frame_id"] != not_encoded]
    tables.write(data / "curate", "frames", tables.from_rows("frames", frames))
    tables.write(data / "pairs", "triplets", tables.from_rows("triplets", triplets))
    write_encoded(data / "encode", encoded, rng)
    subject_ids = sorted(ids, key=tables.path_order)
    return World(data, subject_ids, write_similarity(data / "similarity", subject_ids, group_size, rng))


def write_similarity(
    folder: Path, subject_ids: list[str], group_size: int = 4096, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Tiles of random embeddings, which are returned [subjects, 16]."""
    vectors = (rng or np.random.default_rng(0)).normal(size=(len(subject_ids), 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    settings = {"encoder": "clip", "weights": None, "margin": 0.0, "batch_size": 1, "shard_subjects": 1}
    params = SimilarityParams(
        **settings, group_size=group_size, groupings=2, tile=5, neighbours=0, same_subject=None, seed=0
    )
    tables.write_parts(folder, "similarity", tiles(subject_ids, vectors, params))
    return vectors


def frame(frame_id: str, subject: str, noun: str) -> dict[str, Any]:
    """A row of the frames table, of the source that the subject's id begins with."""
    caption = f"a photo of a {noun} number {frame_id[-1]}"
    known = {"subject_id": subject, "class_name": noun, "caption": caption, "source": subject.split("/")[0]}
    return rows.frame(frame_id, **known, path="p", width=64, height=64, noun_start=0, noun_end=1)


def triplet(subject: str, index: int, noun: str, three: list[str], method: str) -> dict[str, Any]:
    """A row of the triplets table: reference, positive and target of a subject."""
    reference, positive, target = three
    return rows.triplet(f"{subject}/{index}", reference, positive, target, class_name=noun, method=method)


def write_encoded(folder: Path, frame_ids: list[str], rng: np.random.Generator) -> None:
    latents, features = [], []
    shape = {"channels": CHANNELS, "height": SIDE, "width": SIDE}
    sizes = {"layers": LAYERS, "tokens": TOKENS, "width": WIDTH}
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[2:6, 2:6] = 255
    for frame_id in frame_ids:
        latent = rng.normal(size=CHANNELS * SIDE * SIDE).astype(np.float16)
        latents.append({"frame_id": frame_id, "latent": latent, "subject_mask": mask.reshape(-1)} | shape)
        for number in range(AUGMENTATIONS):
            hidden = rng.normal(size=LAYERS * TOKENS * WIDTH).astype(np.float16)
            features.append({"frame_id": frame_id, "augmentation": number, "hidden": hidden} | sizes)
    tables.write(folder, "latents", tables.from_rows("latents", latents))
    tables.write(folder, "features", tables.from_rows("features", features))


def write_variant(folder: Path) -> Path:
    """JSON of a variant whose diffusion model is a tiny StableDiffusionPipeline folder."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=20,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=CHANNELS).save_pretrained(folder / "vae")
    text = CLIPTextConfig(
        vocab_size=260,
        hidden_size=20,
        intermediate_size=40,
        projection_dim=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=256,
        eos_token_id=257,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "open_clip_model.safetensors").write_bytes(b"only its digest is read")
    vision = {"width": WIDTH, "image_size": 4, "patch_size": 2}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
    here = {"path": str(folder)}
    parts = dict.fromkeys(("diffusion", "clip", "dino", "detector", "sam"), here)
    tree = {"name": "tiny", "resolution": SIDE, "image_encoder": here | {"layers": [1, 3]}, **parts}
    file = folder / "tiny.json"
    file.write_text(json.dumps(tree))
    return file


def write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer of single letters."""
    folder.mkdir()
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [f"unused{n}" for n in range(256 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    marks = {"bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1], "pad_token": words[-1]}
    settings = marks | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_overlay(folder: Path, variant: Path, **train: Any) -> Path:
    """Write params for training a tiny adapter, as an overlay of params.yaml; keywords override the train section."""
    values = {"steps": 12, "batch": 8, "warmup": 2, "log_every": 1, "checkpoint_every": 4, "validation": NONE, **train}
    overlay = {
        "backbones": {"variant": str(variant)},
        "run": {"work": str(folder / "work"), "device": "cpu", "threads": 1},
        "model": {"width": 16, "heads": 2, "depth": 1, "visual_tokens": 3, "fourier_pairs": 8},
        "train": values,
    }
    file = folder / "overlay.yaml"
    file.write_text(yaml.safe_dump(overlay))
    return file


def write_options(folder: Path, variant: Path, data: Path, **train: Any) -> list[str]:
    """Command-line options of a training run with the params of `write_overlay`."""
    return ["--params", str(write_overlay(folder, variant, **train)), "--data", str(data)]


def tiny_params(folder: Path, variant: Path, data: Path, **train: Any) -> Params:
    """The params that these options select."""
    return Params.read([str(write_overlay(folder, variant, **train))], data=str(data))
