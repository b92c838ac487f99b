"""The adapter's image encoder by JSON: SigLIP 2 and DINOv3 in CLIP's place, sizes known before they are loaded."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import (
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from model.backbones.encoders import after_preparing
from model.backbones.features.source import FeatureSource, feature_source
from model.backbones.variant import ImageEncoderSpec, load_variant
from runtime.errors import ModelError

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 8}
SHAPES = {"siglip": (2, 4, 16), "naflex": (2, 16, 16), "dino": (2, 1 + 4, 16)}
"""K, N, d of each."""


@pytest.fixture(scope="module", params=SHAPES)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, FeatureSource]:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    if name == "siglip":
        SiglipModel(
            SiglipConfig(vision_config=SIZES | {"image_size": 32, "patch_size": 16}, text_config=TEXT)
        ).save_pretrained(folder)
        SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    elif name == "naflex":
        Siglip2Model(
            Siglip2Config(vision_config=SIZES | {"patch_size": 8, "num_patches": 9}, text_config=TEXT)
        ).save_pretrained(folder)
        Siglip2ImageProcessor(patch_size=8, max_num_patches=17).save_pretrained(folder)
    else:
        DINOv3ViTModel(DINOv3ViTConfig(**SIZES, image_size=32, num_register_tokens=2)).save_pretrained(folder)
        DINOv3ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    spec = ImageEncoderSpec(path=str(folder), kind="dino" if name == "dino" else "siglip", layers=(0, 2))
    return name, feature_source(load_variant("toybox").model_copy(update={"image_encoder": spec}), "mfi")


def test_shape_and_name_are_known_before_loading(named: tuple[str, FeatureSource]) -> None:
    name, source = named
    encoder = source.load("cpu", batch_size=2)
    squares = [Image.new("RGB", (side, side), colour) for side, colour in ((64, "red"), (50, "white"), (31, "blue"))]
    states = encoder.hidden_states(squares, source.layers)
    assert states.shape[1:] == source.shape == SHAPES[name]
    assert encoder.name == source.name
    assert encoder.hidden_states([], source.layers).shape == (0, *source.shape)
    ready = after_preparing(encoder).hidden_states([encoder.preprocess(one) for one in squares], source.layers)
    assert torch.equal(states, ready)
    assert torch.equal(states[1:2], encoder.hidden_states(squares[1:2], source.layers))
    with pytest.raises(ModelError, match=r"layers \[3\] must ascend within its blocks 0\.\.2"):
        encoder.hidden_states(squares, [3])


def test_states_are_those_of_the_library(named: tuple[str, FeatureSource], photos: list[Image.Image]) -> None:
    name, source = named
    encoder = source.load("cpu", batch_size=2)
    with torch.no_grad():
        found = encoder.model(**encoder.processor(images=photos[:2], return_tensors="pt"), output_hidden_states=True)
    expected = torch.stack([found.hidden_states[1], found.hidden_states[3]], dim=1)
    if name == "dino":
        expected = expected[:, :, [0, 3, 4, 5, 6]]  # without registers
    torch.testing.assert_close(encoder.hidden_states(photos[:2], source.layers), expected[:, :, : source.shape[1]])


def test_photos_of_several_shapes_have_no_states_of_naflex(
    named: tuple[str, FeatureSource], photos: list[Image.Image]
) -> None:
    name, source = named
    encoder = source.load("cpu", batch_size=2)
    if name == "naflex":
        with pytest.raises(ModelError, match="hidden states need photos of one shape"):
            encoder.hidden_states(photos[:3], source.layers)
    else:
        assert len(encoder.hidden_states(photos[:3], source.layers)) == 3


def test_kind_is_part_of_a_digest_only_where_it_is_not_clip() -> None:
    """Digests in tables made before there were kinds stay."""
    plain = ImageEncoderSpec(path="weights/x", layers=(1, 2))
    assert plain.model_dump() == {"path": "weights/x", "revision": None, "layers": (1, 2)}
    assert json.loads(plain.model_copy(update={"kind": "dino"}).model_dump_json())["kind"] == "dino"
    assert "path" not in plain.model_dump(exclude={"path"})
