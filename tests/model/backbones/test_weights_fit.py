"""Every loader reads all weights of its file and no others, and only the model type that it knows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import squeezenet1_1
from transformers import (
    CLIPTextModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    MMGroundingDinoForObjectDetection,
    ViTConfig,
    ViTModel,
)

from model.adapter import WEIGHTS as ADAPTER_WEIGHTS
from model.adapter import Adapter
from model.backbones.clip import WEIGHTS, load_clip
from model.backbones.diffusion import load_diffusion
from model.backbones.grounded_sam import load_detector
from model.backbones.hub import identify
from model.backbones.perceptual import load_perceptual
from model.backbones.reward import load_reward
from model.backbones.segmenters.sam import load_sam
from model.backbones.variant import ROOT, ClipSpec, DetectorSpec, DiffusionSpec, DinoSpec, LpipsSpec, SamSpec, Spec
from model.backbones.vision import load_dino
from runtime.errors import ModelError

TOYBOX = ROOT / "weights" / "toybox"
LOADERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "clip": (WEIGHTS, lambda folder: load_clip(ClipSpec(path=str(folder)), "cpu")),
    "dino": ("model.safetensors", lambda folder: load_dino(DinoSpec(path=str(folder)), "cpu")),
    "detector": ("model.safetensors", lambda folder: load_detector(DetectorSpec(path=str(folder)), "cpu")),
    "sam": ("model.safetensors", lambda folder: load_sam(SamSpec(path=str(folder)), "cpu")),
    "reward": ("model.safetensors", lambda folder: load_reward(Spec(path=str(folder)), "cpu")),
    "unet": ("unet/diffusion_pytorch_model.safetensors", lambda folder: load_sd(folder)),
    "vae": ("vae/diffusion_pytorch_model.safetensors", lambda folder: load_sd(folder)),
    "text_encoder": ("text_encoder/model.safetensors", lambda folder: load_sd(folder)),
    "adapter": (ADAPTER_WEIGHTS, Adapter.load),
}
"""By checkpoint: its weight file and its loader."""


def load_sd(folder: Path) -> object:
    return load_diffusion(DiffusionSpec(path=str(folder)), torch.float32, "cpu")


def copied(name: str, tmp_path: Path) -> Path:
    folder = TOYBOX / ("diffusion" if name in ("unet", "vae", "text_encoder") else name)
    return Path(shutil.copytree(folder, tmp_path / name))


@pytest.mark.parametrize("fault", ["missing", "unexpected"])
@pytest.mark.parametrize("name", LOADERS)
def test_missing_and_unexpected_weights_are_refused(name: str, fault: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path)
    file, load = LOADERS[name]
    load(folder)
    state = load_file(folder / file)
    key = next(key for key in sorted(state) if key.endswith(".weight"))
    state |= {"head.scale": torch.ones(1)}
    if fault == "missing":
        del state["head.scale"], state[key]
    save_file(state, folder / file, {"format": "pt"})
    with pytest.raises(ModelError, match=name) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LOADERS)
def test_git_lfs_pointer_in_place_of_weights_is_named(name: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path)
    file, load = LOADERS[name]
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4\n"
    (folder / file).write_text(pointer)
    with pytest.raises(ModelError, match=f"{file}: is a git-lfs pointer, not the file itself; run git lfs pull"):
        load(folder)


def test_git_lfs_pointer_is_no_identity_and_no_single_file(tmp_path: Path) -> None:
    file = tmp_path / "net.pth"
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        identify(Spec(path=str(tmp_path)), [file])
    with pytest.raises(ModelError, match="git lfs pull"):
        load_perceptual(LpipsSpec(path=str(file), net="squeeze", sha256="0" * 64), "cpu")


def test_lpips_network_with_weights_of_more_features_is_refused(tmp_path: Path) -> None:
    state = squeezenet1_1().state_dict()
    torch.save(state, tmp_path / "net.pth")
    load_perceptual(LpipsSpec(path=str(tmp_path / "net.pth"), net="squeeze"), "cpu")
    torch.save(state | {"features.13.weight": torch.ones(1)}, tmp_path / "net.pth")
    with pytest.raises(ModelError, match=r"1 unexpected weights, first 'features.13.weight'"):
        load_perceptual(LpipsSpec(path=str(tmp_path / "net.pth"), net="squeeze"), "cpu")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "text_encoder",
            {"model_type": "chinese_clip_text_model"},
            "is of a chinese_clip_text_model, expected clip_te",
        ),
        ("text_encoder", {"model_type": None}, "config.json has neither model_type nor _class_name"),
        ("unet", {"_class_name": "UNet2DModel"}, "config.json is of a UNet2DModel, expected UNet2DConditionModel"),
        ("vae", {"_class_name": "AsymmetricAutoencoderKL"}, "is of a AsymmetricAutoencoderKL, expected AutoencoderKL"),
        ("detector", {"model_type": "owlvit"}, "its model_type is owlvit"),
    ],
)
def test_folder_of_another_model_type_is_refused(
    part: str, change: dict[str, str], message: str, tmp_path: Path
) -> None:
    folder = copied(part, tmp_path)
    config = (folder / part if part in LOADERS and (folder / part).is_dir() else folder) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        LOADERS[part][1](folder)


def test_positions_that_open_clip_would_interpolate_are_refused(tmp_path: Path) -> None:
    folder = copied("clip", tmp_path)
    state = {key: value.float() for key, value in load_file(folder / WEIGHTS).items()}
    for key in ("visual.positional_embedding", "positional_embedding"):
        more = torch.cat([state[key], state[key][1:]])[: 1 + (round((len(state[key]) - 1) ** 0.5) + 1) ** 2]
        save_file(state | {key: more}, folder / WEIGHTS)
        with pytest.raises(ModelError, match=f"'{key}' is .*, but open_clip_config.json gives"):
            LOADERS["clip"][1](folder)


def test_heads_after_the_class_token_are_left_unread(tmp_path: Path, dino_folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    for model in (ViTModel(ViTConfig(**sizes)), Dinov2ForImageClassification(Dinov2Config(**sizes))):
        model.save_pretrained(tmp_path)
        shutil.copy(dino_folder / "preprocessor_config.json", tmp_path)
        assert load_dino(DinoSpec(path=str(tmp_path)), "cpu").model.config.hidden_size == 32


def test_old_text_encoder_with_position_ids_loads(tmp_path: Path) -> None:
    folder = copied("text_encoder", tmp_path)
    file = folder / "text_encoder" / "model.safetensors"
    positions = CLIPTextModel.from_pretrained(folder / "text_encoder").embeddings.position_ids
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    save_file(state | {"text_model.embeddings.position_ids": positions.clone()}, file, {"format": "pt"})
    load_sd(folder)


def test_mm_grounding_dino_is_loaded_as_what_it_is(mm_detector_folder: Path, tmp_path: Path) -> None:
    """Its head has a scale and a bias that Grounding DINO lacks."""
    folder = Path(shutil.copytree(mm_detector_folder, tmp_path / "detector"))
    found = load_detector(DetectorSpec(path=str(folder)), "cpu", batch_size=1)
    assert type(found.model) is MMGroundingDinoForObjectDetection
    assert [float(head.bias) for head in found.model.class_embed] == [-3.0, -3.0]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "grounding-dino"}))
    with pytest.raises(ModelError, match="unexpected weights for a transformers folder of Grounding DINO"):
        load_detector(DetectorSpec(path=str(folder)), "cpu")
