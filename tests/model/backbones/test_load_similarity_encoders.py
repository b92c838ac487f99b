"""Encoders of likeness between subjects: every kind from a small checkpoint in the format in which it is published."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from model.backbones.clip import WEIGHTS, load_clip
from model.backbones.encoders import after_preparing, load_encoder
from model.backbones.variant import ClipSpec, DinoSpec, Spec
from model.backbones.vision import load_dino, load_siglip
from runtime.errors import ModelError

# Small relatives of open_clip's families: convolutional, timm's (as its SigLIP, EVA and ConvNeXt are), CoCa.
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
OPEN_CLIP = {
    "vit": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    "resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
        "text_cfg": TEXT,
    },
    "timm": {
        "embed_dim": 64,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160,
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "none",
        },
        "text_cfg": TEXT,
    },
    "coca": {
        "embed_dim": 16,
        "vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        "custom_text": True,
    },
}


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both halves of a SigLIP, as google publishes it: one safetensors with `vision_model.` and `text_model.`."""
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        vision_config=sizes | {"image_size": 32, "patch_size": 16},
        text_config=sizes | {"vocab_size": 50, "max_position_embeddings": 8},
    )
    SiglipModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_siglip_is_the_image_half_of_the_whole_model(siglip_folder: Path, photos: list[Image.Image]) -> None:
    names = set(load_file(siglip_folder / "model.safetensors"))
    assert {"vision_model.embeddings.patch_embedding.weight", "vision_model.head.probe", "logit_scale"} <= names
    siglip = load_siglip(Spec(path=str(siglip_folder)), "cpu", batch_size=4)
    whole = SiglipModel.from_pretrained(siglip_folder).eval()
    processor = AutoImageProcessor.from_pretrained(siglip_folder)
    with torch.no_grad():
        pooled = whole.vision_model(**processor(images=photos, return_tensors="pt")).pooler_output
    found = siglip.encode_image(photos)
    torch.testing.assert_close(found, F.normalize(pooled, dim=1))
    assert found.dtype == torch.float32 and siglip.encode_image([]).shape == (0, 32)
    alone = torch.cat([siglip.encode_image([photo]) for photo in photos])
    assert torch.equal(found, alone)
    assert siglip.name == f"{siglip_folder.name}@{siglip.revision[:12]}"


@pytest.fixture(scope="module")
def naflex_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both halves of a SigLIP 2 NaFlex, as google publishes it; a photo is 16 patches of 8 px at most."""
    folder = tmp_path_factory.mktemp("naflex")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Siglip2Config(
        vision_config=sizes | {"patch_size": 8, "num_patches": 9},
        text_config=sizes | {"vocab_size": 50, "max_position_embeddings": 8},
    )
    Siglip2Model(config).save_pretrained(folder)
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(folder)
    return folder


def test_naflex_is_the_image_half_of_the_whole_model(naflex_folder: Path, photos: list[Image.Image]) -> None:
    """Square photos fill all patches, the others leave some empty, and none depends on which of them it is with."""
    siglip = load_siglip(Spec(path=str(naflex_folder)), "cpu", batch_size=4)
    whole = Siglip2Model.from_pretrained(naflex_folder).eval()
    inputs = AutoImageProcessor.from_pretrained(naflex_folder)(images=photos, return_tensors="pt")
    assert len({tuple(shape) for shape in inputs["spatial_shapes"].tolist()}) > 3
    with torch.no_grad():
        pooled = whole.vision_model(**inputs).pooler_output
    masks: list[torch.Tensor] = []
    siglip.model.register_forward_pre_hook(
        lambda _, __, given: masks.append(given["pixel_attention_mask"]), with_kwargs=True
    )
    found = siglip.encode_image(photos)
    torch.testing.assert_close(found, F.normalize(pooled, dim=1))
    assert len(masks) == 3 and not any(mask[:, -1].any() for mask in masks)  # always padded: the same kernels
    assert torch.equal(found, torch.cat([siglip.encode_image([photo]) for photo in photos]))
    assert torch.equal(found.flip(0), siglip.encode_image(photos[::-1]))
    assert siglip.encode_image([]).shape == (0, 32)


def test_naflex_patches_are_those_of_the_library_at_any_size(naflex_folder: Path) -> None:
    """Of an image with more patches than a photo has, and a rest of 3 px that is lost."""
    siglip = load_siglip(Spec(path=str(naflex_folder)), "cpu", batch_size=4)
    assert siglip.reads_any_size
    images = torch.rand(2, 3, 43, 43, generator=torch.Generator().manual_seed(0))
    patches = F.unfold((images[..., :40, :40] - 0.5) / 0.5, 8, stride=8)  # channels outermost; the library's innermost
    patches = patches.view(2, 3, 64, 25).permute(0, 3, 2, 1).flatten(2)
    model = Siglip2VisionModel.from_pretrained(naflex_folder).eval()
    mask, shapes = torch.ones(2, 25, dtype=torch.int32), torch.tensor([[5, 5]] * 2)
    with torch.no_grad():
        states = model(patches, mask, shapes, output_hidden_states=True).hidden_states
    torch.testing.assert_close(siglip.patch_states(images, [0, 1]), torch.stack([states[1], states[2]], dim=1))


def test_siglip_with_faults_is_one_sentence(siglip_folder: Path, tmp_path: Path) -> None:
    for file in siglip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    gone = "vision_model.head.probe"
    save_file({k: v for k, v in state.items() if k != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"1 missing weights for a transformers folder of SigLIP, first '.*head.probe'"
    ):
        load_siglip(Spec(path=str(tmp_path)), "cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["vision_use_head"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has no pooling head") as caught:
        load_siglip(Spec(path=str(tmp_path)), "cpu")
    assert "\n" not in str(caught.value)


def test_two_steps_give_what_one_gives(
    clip_folder: Path, dino_folder: Path, siglip_folder: Path, naflex_folder: Path, photos: list[Image.Image]
) -> None:
    clip = load_clip(ClipSpec(path=str(clip_folder)), "cpu", batch_size=4)
    for kind, folder, whole in (
        ("clip", clip_folder, clip),
        ("dino", dino_folder, load_dino(DinoSpec(path=str(dino_folder)), "cpu", batch_size=4)),
        ("siglip", siglip_folder, load_siglip(Spec(path=str(siglip_folder)), "cpu", batch_size=4)),
        ("siglip", naflex_folder, load_siglip(Spec(path=str(naflex_folder)), "cpu", batch_size=4)),
    ):
        encoder = load_encoder(kind, Spec(path=str(folder)), "cpu", 4)
        assert encoder.name == whole.name
        assert torch.equal(encoder.embed([encoder.prepare(p) for p in photos]), whole.encode_image(photos))
    ready = after_preparing(clip).hidden_states([clip.preprocess(p) for p in photos], [1, 2])
    assert torch.equal(ready, clip.hidden_states(photos, [1, 2]))


@pytest.mark.parametrize("family", OPEN_CLIP)
def test_any_open_clip_model_embeds(family: str, tmp_path: Path, photos: list[Image.Image]) -> None:
    config = OPEN_CLIP[family]
    kinds = {"timm": open_clip.CustomTextCLIP, "coca": open_clip.CoCa}
    torch.manual_seed(0)
    sizes = {key: value for key, value in config.items() if key != "custom_text"}
    state = kinds.get(family, open_clip.CLIP)(**sizes).state_dict()
    save_file({key: value.contiguous().clone() for key, value in state.items()}, tmp_path / WEIGHTS)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    encoder = load_encoder("clip", Spec(path=str(tmp_path)), "cpu", 4)
    vectors = encoder.embed([encoder.prepare(photo) for photo in photos[:5]])
    assert vectors.shape == (5, config["embed_dim"])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    with torch.no_grad():
        pixels = torch.stack([encoder.prepare(photo) for photo in photos[:5]])
        torch.testing.assert_close(vectors, model.encode_image(pixels, normalize=True))


def test_folder_of_another_kind_is_one_sentence(clip_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"clip.*: cannot be read as a transformers folder of SigLIP") as caught:
        load_encoder("siglip", Spec(path=str(clip_folder)), "cpu", 4)
    assert "\n" not in str(caught.value)
