"""PE-Core, an open_clip folder whose image tower is timm's: embeddings, hidden states and sizes are the libraries'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import register_model
from timm.models.eva import Eva, vit_pe_core_tiny_patch16_384
from torch import Tensor

from model.backbones.clip import WEIGHTS, Clip, load_clip
from model.backbones.encoders import load_encoder
from model.backbones.features.source import feature_source
from model.backbones.features.towers import fitting, load_tower
from model.backbones.variant import ClipSpec, ImageEncoderSpec, TowerSpec, load_variant
from runtime.errors import ModelError


@register_model
def vit_pe_core_test(pretrained: bool = False, **given: Any) -> Eva:
    """PE-Core T with less of everything."""
    sizes = {"embed_dim": 32, "depth": 3, "num_heads": 2, "attn_pool_num_heads": 2, "img_size": 48}
    return vit_pe_core_tiny_patch16_384(pretrained, **{**sizes, **given})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As timm/PE-Core-T-16-384 is published."""
    folder = tmp_path_factory.mktemp("pe")
    vision = {"image_size": 48, "timm_model_name": "vit_pe_core_test", "timm_model_pretrained": False}
    config = {
        "embed_dim": 24,
        "vision_cfg": vision | {"timm_pool": "map", "timm_proj": None},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    state = open_clip.CustomTextCLIP(**config).state_dict()
    save_file({key: value.contiguous().clone() for key, value in state.items()}, folder / WEIGHTS)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    tree = {"model_cfg": config | {"custom_text": True}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(tree))
    return folder


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return load_clip(ClipSpec(path=str(folder)), "cpu", batch_size=4)


def test_embeddings_are_those_of_open_clip(clip: Clip, folder: Path, photos: list[Image.Image]) -> None:
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    words = ["a mug", "a teddy bear on a beach"]
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(photo) for photo in photos]), normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(words), normalize=True)
    found = clip.encode_image(photos)
    torch.testing.assert_close(found, images)
    torch.testing.assert_close(clip.encode_text(words), texts)
    assert torch.equal(found, torch.cat([clip.encode_image([photo]) for photo in photos]))
    assert clip.encode_image([]).shape == clip.encode_text([]).shape == (0, 24)
    encoder = load_encoder("clip", ClipSpec(path=str(folder)), "cpu", 4)
    assert torch.equal(encoder.embed([encoder.prepare(photo) for photo in photos]), found)


def test_hidden_state_k_is_the_output_of_block_k(clip: Clip, photos: list[Image.Image]) -> None:
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in clip.model.visual.trunk.blocks
    ]
    clip.encode_image(photos[:4])
    for hook in hooks:
        hook.remove()
    states = clip.hidden_states(photos[:4], [0, 2])
    assert states.shape == (4, 2, 1 + 9, 32)
    assert torch.equal(states, torch.stack([seen[0], seen[2]], dim=1))
    assert clip.hidden_states([], [0, 2]).shape == (0, 2, 10, 32)
    pixels = torch.stack([clip.preprocess(photo) for photo in photos[:4]])
    torch.testing.assert_close(clip.patch_states((pixels + 1) / 2, [0, 2]), states[:, :, 1:])
    with pytest.raises(ModelError, match=r"layers \[3\] must ascend within its blocks 0\.\.2"):
        clip.hidden_states(photos, [3])


def test_it_is_an_image_encoder_and_a_tower(clip: Clip, folder: Path) -> None:
    """Its sizes are known before it is loaded."""
    encoder = ImageEncoderSpec(path=str(folder), layers=(0, 1))
    source = feature_source(load_variant("toybox").model_copy(update={"image_encoder": encoder}), "mfi")
    assert source.shape == (2, 10, 32)
    assert source.name == clip.name
    spec = TowerSpec(path=str(folder), kind="clip", block=1, shallow=(0, 1, 2))
    assert fitting(load_tower(spec, "cpu", torch.float32, 2), spec, 48) == 9
    with pytest.raises(ModelError, match=r"reads images of 48 px, but the variant's detail\.side is 32"):
        fitting(clip, spec, 32)


@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_other_weights_are_one_sentence(fault: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    state = load_file(folder / WEIGHTS)
    if fault == "missing":
        del state["visual.trunk.attn_pool.latent"]
    else:
        state["visual.trunk.scale"] = torch.ones(1)
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match="cannot be read as an open_clip folder") as caught:
        load_clip(ClipSpec(path=str(tmp_path)), "cpu")
    assert "\n" not in str(caught.value)
