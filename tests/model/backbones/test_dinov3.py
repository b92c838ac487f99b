"""DINOv3 in DINOv2's place: embeddings and patches are those of transformers' processor and models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
)

from model.backbones.encoders import load_encoder
from model.backbones.features.towers import fitting
from model.backbones.variant import DinoSpec, TowerSpec
from model.backbones.vision import load_dino
from runtime.errors import ModelError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A ViT with registers and a ConvNeXt, as facebook publishes them."""
    vit = DINOv3ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        num_register_tokens=4,
        initializer_range=0.3,
    )
    convnext = DINOv3ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], initializer_range=0.3)
    made = {}
    for name, kind, config in (("vit", DINOv3ViTModel, vit), ("convnext", DINOv3ConvNextModel, convnext)):
        made[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        kind(config).save_pretrained(made[name])
        DINOv3ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(made[name])
    return made


@pytest.mark.parametrize(("name", "width"), [("vit", 32), ("convnext", 24)])
def test_embeddings_are_those_of_the_library(
    name: str, width: int, folders: dict[str, Path], photos: list[Image.Image]
) -> None:
    dino = load_dino(DinoSpec(path=str(folders[name])), "cpu", batch_size=4)
    model, processor = (kind.from_pretrained(folders[name]) for kind in (AutoModel, AutoImageProcessor))
    with torch.no_grad():
        pooled = model.eval()(**processor(images=photos, return_tensors="pt")).pooler_output
    found = dino.encode_image(photos)
    torch.testing.assert_close(found, F.normalize(pooled, dim=1))
    assert torch.equal(found, torch.cat([dino.encode_image([photo]) for photo in photos]))
    assert dino.encode_image([]).shape == (0, width)
    encoder = load_encoder("dino", DinoSpec(path=str(folders[name])), "cpu", 4)
    assert torch.equal(encoder.embed([encoder.prepare(photo) for photo in photos]), found)


def test_names_on_disk_are_the_published_ones(folders: dict[str, Path]) -> None:
    published = {"vit": "layer.0.attention.q_proj.weight", "convnext": "stages.0.layers.0.depthwise_conv.weight"}
    for name, key in published.items():
        assert key in load_file(folders[name] / "model.safetensors")


def test_patches_are_those_of_the_library_at_any_side(folders: dict[str, Path]) -> None:
    dino = load_dino(DinoSpec(path=str(folders["vit"])), "cpu", batch_size=4)
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (dino.processor.image_mean, dino.processor.image_std)
    )
    model = DINOv3ViTModel.from_pretrained(folders["vit"]).eval()
    outputs: list[torch.Tensor] = []
    for layer in model.model.layer:
        layer.register_forward_hook(lambda _, __, out: outputs.append(out))
    with torch.no_grad():
        model((images - mean) / std)
    found = dino.patch_states(images, [0, 2])
    assert found.shape == (2, 2, 9, 32)
    torch.testing.assert_close(found, torch.stack([outputs[0][:, 5:], outputs[2][:, 5:]], dim=1))
    tower = TowerSpec(path=str(folders["vit"]), kind="dino", block=2, shallow=(0, 1, 2))
    assert fitting(dino, tower, 48) == 9


def test_convnext_is_no_tower(folders: dict[str, Path]) -> None:
    dino = load_dino(DinoSpec(path=str(folders["convnext"])), "cpu")
    tower = TowerSpec(path="weights/dinov3", kind="dino", block=2, shallow=(0, 1, 2))
    with pytest.raises(ModelError, match="weights/dinov3: hidden states need a transformer, but this is a dinov3_conv"):
        fitting(dino, tower, 32)


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_missing_and_unexpected_weights_are_one_sentence(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders[name].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    gone = {"vit": "norm.bias", "convnext": "layer_norm.bias"}[name]
    for word, changed in (
        ("missing", {k: v for k, v in state.items() if k != gone}),
        ("unexpected", state | {"scale": torch.ones(1)}),
    ):
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=f"1 {word} weights for a transformers folder of DINO") as caught:
            load_dino(DinoSpec(path=str(tmp_path)), "cpu")
        assert "\n" not in str(caught.value)
