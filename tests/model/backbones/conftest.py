"""Small checkpoints with random weights, written in the formats in which the real ones are published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BitImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    SwinConfig,
)

from model.backbones.segmenters.sam import build_sam
from tests.world.sam2 import write_sam2

SAM_SIZES = {
    "image_size": 64,
    "patch_size": 8,
    "depth": 2,
    "width": 32,
    "heads": 2,
    "window_size": 4,
    "global_attention": [1],
    "prompt_embed_dim": 32,
    "decoder_heads": 2,
    "decoder_mlp_dim": 32,
    "iou_head_dim": 16,
}


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Nine noisy photos of several shapes; the first two are equally large."""
    draw = torch.Generator().manual_seed(3)
    sizes = [(64, 64), (64, 64), (96, 64), (64, 80), (120, 50), (50, 120), (33, 47), (64, 64), (200, 150)]
    arrays = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=draw).numpy() for w, h in sizes]
    return [Image.fromarray(array) for array in arrays]


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline folder with the weight names of the published SD 1.5."""
    folder = tmp_path_factory.mktemp("sd")
    write_networks(folder, text_widths=[32], variant=None)
    rename(folder / "text_encoder" / "model.safetensors", lambda key: f"text_model.{key}")
    rename(folder / "vae" / "diffusion_pytorch_model.safetensors", old_attention_name)
    PNDMScheduler(beta_start=0.00085, beta_end=0.012, skip_prk_steps=True).save_pretrained(folder / "scheduler")
    write_index(folder, "StableDiffusionPipeline", "PNDMScheduler", ["CLIPTextModel"])
    return folder


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionXLPipeline folder with fp16 weights only, as `weights: fp16` fetches it."""
    folder = tmp_path_factory.mktemp("sdxl")
    write_networks(folder, text_widths=[32, 48], variant="fp16")
    EulerDiscreteScheduler(timestep_spacing="leading").save_pretrained(folder / "scheduler")
    write_index(
        folder, "StableDiffusionXLPipeline", "EulerDiscreteScheduler", ["CLIPTextModel", "CLIPTextModelWithProjection"]
    )
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip hub folder with the standard BPE tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 64, "layers": 4, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    model_cfg = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    state = open_clip.CLIP(**model_cfg).state_dict()
    save_file({key: value.half() for key, value in state.items()}, folder / "open_clip_model.safetensors")
    statistics = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    write_json(folder / "open_clip_config.json", {"model_cfg": model_cfg, "preprocess_cfg": statistics})
    return folder


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16, initializer_range=0.3
    )
    Dinov2Model(config).half().save_pretrained(folder)
    size = {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}
    BitImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GroundingDino folder with a slow-format BERT vocabulary, as IDEA-Research publishes it."""
    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    swin = SwinConfig(
        embed_dim=16, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=4, image_size=64, out_indices=[2, 3]
    )
    config = GroundingDinoConfig(
        backbone_config=swin,
        text_config={
            "model_type": "bert",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 1100,
        },
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=8,
        num_feature_levels=3,
        max_text_len=16,
    )
    model = GroundingDinoForObjectDetection(config)
    for layer in model.bbox_embed:  # the last layer starts at zero, which would give every photo the same boxes
        torch.nn.init.normal_(layer.layers[-1].weight, std=0.5)
    model.save_pretrained(folder)
    # Grounding DINO's special ids are fixed in its code: [CLS] 101, [SEP] 102, "." 1012, "?" 1029.
    words = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    words |= {1040: "mug", 1041: "teddy", 1042: "bear", 1043: "dog"}
    vocabulary = [words.get(index, f"[unused{index}]") for index in range(1100)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    bert = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    write_json(folder / "tokenizer_config.json", bert | {"processor_class": "GroundingDinoProcessor"})
    image = {
        "image_processor_type": "GroundingDinoImageProcessor",
        "processor_class": "GroundingDinoProcessor",
        "size": {"shortest_edge": 64, "longest_edge": 107},
        "do_pad": True,
    }
    write_json(folder / "preprocessor_config.json", image)
    return folder


@pytest.fixture(scope="session")
def mm_detector_folder(tmp_path_factory: pytest.TempPathFactory, detector_folder: Path) -> Path:
    """An MM-Grounding-DINO folder, as openmmlab-community publishes it, and LLMDet: no heads shared by the layers."""
    folder = tmp_path_factory.mktemp("mm") / "detector"
    shutil.copytree(detector_folder, folder)
    tree = GroundingDinoConfig.from_pretrained(folder).to_dict() | {"model_type": MMGroundingDinoConfig.model_type}
    unshared = {"decoder_bbox_embed_share": False, "decoder_cls_embed_share": False}
    torch.manual_seed(0)
    model = MMGroundingDinoForObjectDetection(MMGroundingDinoConfig(**tree | unshared))
    with torch.no_grad():
        for box, word in zip(model.bbox_embed, model.class_embed, strict=True):
            torch.nn.init.normal_(box.layers[-1].weight, std=0.5)
            word.bias.fill_(-3.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sam_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    state = {key: value.half().contiguous() for key, value in build_sam(SAM_SIZES).state_dict().items()}
    save_file(state, folder / "model.safetensors")
    write_json(folder / "config.json", SAM_SIZES)
    return folder


@pytest.fixture(scope="session")
def sam2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SAM 2.1 for videos, as facebook publishes it."""
    return write_sam2(tmp_path_factory.mktemp("sam2"))


def write_networks(folder: Path, text_widths: list[int], variant: str | None) -> None:
    """UNet, VAE, text encoders and tokenizers of a small pipeline, cross-attention as wide as the texts together."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=sum(text_widths),
        norm_num_groups=8,
    ).to(torch.float16 if variant else torch.float32).save_pretrained(folder / "unet", variant=variant)
    AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
    ).to(torch.float16 if variant else torch.float32).save_pretrained(folder / "vae", variant=variant)
    for index, width in enumerate(text_widths):
        suffix = f"_{index + 1}" if index else ""
        write_clip_tokenizer(folder / f"tokenizer{suffix}")
        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=60,
            bos_token_id=58,
            eos_token_id=59,
        )
        kind = CLIPTextModelWithProjection if index else CLIPTextModel
        kind(config).half().save_pretrained(folder / f"text_encoder{suffix}", variant=variant)


def write_clip_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer as published: vocab.json, merges.txt and the two small configurations."""
    folder.mkdir()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "mu", "mug</w>", "a photo</w>", "!", "!</w>", "-"]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {word: index for index, word in enumerate(vocabulary)})
    (folder / "merges.txt").write_text("#version: 0.2\nm u\nmu g</w>\n")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    marks["pad_token"] = "<|endoftext|>"
    write_json(folder / "special_tokens_map.json", marks)
    write_json(folder / "tokenizer_config.json", marks | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})


def write_index(folder: Path, pipeline: str, scheduler: str, text_classes: list[str]) -> None:
    index: dict[str, object] = {"_class_name": pipeline, "_diffusers_version": "0.6.0"}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {
        "scheduler": ["diffusers", scheduler],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    for number, kind in enumerate(text_classes):
        suffix = f"_{number + 1}" if number else ""
        index |= {
            f"text_encoder{suffix}": ["transformers", kind],
            f"tokenizer{suffix}": ["transformers", "CLIPTokenizer"],
        }
    write_json(folder / "model_index.json", index)


def old_attention_name(key: str) -> str:
    """The VAE attention names of Stable Diffusion's published weights."""
    for new, old in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
        key = key.replace(new, old)
    return key


def rename(file: Path, name: Callable[[str], str]) -> None:
    save_file({name(key): value for key, value in load_file(file).items()}, file, metadata={"format": "pt"})


def write_json(file: Path, tree: object) -> None:
    file.write_text(json.dumps(tree, indent=2))
