"""The two towers: views of a reference, hidden states as the libraries' own models give them, the variant's entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BitImageProcessor,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionModel,
)

from model.backbones.clip import load_clip
from model.backbones.encoders import after_preparing
from model.backbones.features.source import FeatureParams, ViewParams, black_features, feature_source
from model.backbones.features.towers import TwoTowers, high_views, load_towers, low_view
from model.backbones.variant import ClipSpec, DetailSpec, Variant, load_variant
from runtime.errors import ModelError

SIDE = 28
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SigLIP with both halves and DINOv2 with registers, trained at another size, as they are published."""
    siglip, dino = tmp_path_factory.mktemp("siglip"), tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 2}
    config = SiglipConfig(
        vision_config=sizes | {"image_size": SIDE, "patch_size": 9},
        text_config=sizes | {"vocab_size": 50, "max_position_embeddings": 8},
    )
    SiglipModel(config).save_pretrained(siglip)
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(siglip)
    registers = Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=5, num_attention_heads=2, image_size=45, patch_size=9, num_register_tokens=4
    )
    Dinov2WithRegistersModel(registers).save_pretrained(dino)
    BitImageProcessor(size={"shortest_edge": 45}, image_mean=MEAN, image_std=STD).save_pretrained(dino)
    return siglip, dino


def detail(folders: tuple[Path, Path], **changes: Any) -> DetailSpec:
    """SIDE is no multiple of the patches: 3 x 3 of them, and a pixel is lost."""
    siglip, dino = ({"path": str(folder)} for folder in folders)
    towers = [
        siglip | {"kind": "siglip", "block": 3, "shallow": [0, 1, 2]},
        dino | {"kind": "dino", "block": 2, "shallow": [1, 0, 3]},
    ]
    return DetailSpec.model_validate({"towers": towers, "side": SIDE, **changes})


@pytest.fixture(scope="module")
def towers(folders: tuple[Path, Path]) -> TwoTowers:
    return load_towers(detail(folders), "cpu", batch_size=4)


@pytest.fixture(scope="module")
def views(photos: list[Image.Image]) -> Tensor:
    """What both towers read of the first three photos, in 0..1 [3, 5, 3, SIDE, SIDE]."""
    squeezed = [photo.convert("RGB").resize((2 * SIDE, 2 * SIDE), Image.Resampling.BILINEAR) for photo in photos[:3]]
    squares = torch.from_numpy(np.stack([np.asarray(square) for square in squeezed])).permute(0, 3, 1, 2) / 255
    low = F.interpolate(squares, (SIDE, SIDE), mode="bilinear", align_corners=True)
    return torch.stack([low, *(squares[:, :, i::2, j::2] for i in range(2) for j in range(2))], dim=1)


def outputs(model: nn.Module, blocks: Any, pixels: Tensor, prefix: int) -> list[Tensor]:
    """What each of a model's blocks returned for these pixels, patches only."""
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    with torch.no_grad():
        model(pixels)
    for hook in hooks:
        hook.remove()
    return [out[:, prefix:] for out in found]


def test_hidden_states_are_those_of_the_library_s_models(
    towers: TwoTowers, folders: tuple[Path, Path], photos: list[Image.Image], views: Tensor
):
    siglip = SiglipModel.from_pretrained(folders[0]).vision_model.eval()
    dino = Dinov2WithRegistersModel.from_pretrained(folders[1]).eval()
    found = towers.hidden_states(photos[:3], range(8))
    assert found.shape == (3, 8, 9, 48) and found.dtype == torch.float32
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    for view in range(5):
        first = outputs(siglip, siglip.encoder.layers, (views[:, view] - 0.5) / 0.5, 0)
        second = outputs(dino, dino.encoder.layer, (views[:, view] - mean) / std, 1 + 4)
        torch.testing.assert_close(found[:, view], torch.cat([first[3], second[2]], dim=-1))
        if view == 0:
            for place, pair in enumerate([(0, 1), (1, 0), (2, 3)]):
                expected = torch.cat([first[pair[0]], second[pair[1]]], dim=-1)
                torch.testing.assert_close(found[:, 5 + place], expected)


def test_named_hidden_states_are_those_of_the_library(folders: tuple[Path, Path], views: Tensor):
    """`hidden_states[block + 1]`, which begins with the embeddings and has no final norm."""
    model = SiglipVisionModel.from_pretrained(folders[0]).eval()
    with torch.no_grad():
        states = model((views[:, 0] - 0.5) / 0.5, output_hidden_states=True).hidden_states
    for block, out in enumerate(outputs(model, model.encoder.layers, (views[:, 0] - 0.5) / 0.5, 0)):
        assert torch.equal(states[block + 1], out)


def test_only_the_layers_asked_for_are_given(towers: TwoTowers, photos: list[Image.Image]):
    whole = towers.hidden_states(photos[:2], range(8))
    for layers in ((0,), (1, 2, 3, 4), (0, 1, 2, 3, 4), (0, 5, 6, 7), (3,), (6,)):
        assert torch.equal(towers.hidden_states(photos[:2], layers), whole[:, list(layers)])
    assert towers.hidden_states([], (0, 1)).shape == (0, 2, 9, 48)
    for layers in ((), (1, 0), (0, 8)):
        with pytest.raises(ModelError, match=r"must ascend within 0\.\.7"):
            towers.hidden_states(photos, layers)


def test_a_photo_s_states_do_not_depend_on_the_others(towers: TwoTowers, photos: list[Image.Image]):
    together = towers.hidden_states(photos[:5], range(5))
    for number in range(5):
        assert torch.equal(towers.hidden_states(photos[number : number + 1], range(5))[0], together[number])
    ready = after_preparing(towers).hidden_states([towers.preprocess(photo) for photo in photos[:5]], range(5))
    assert torch.equal(ready, together)


def test_interleaved_views_are_those_of_pixel_unshuffle():
    squares = torch.randn(2, 3, 8, 8)
    views = high_views(squares, "interleave")
    assert views.shape == (2, 4, 3, 4, 4)
    assert torch.equal(views.transpose(1, 2).flatten(1, 2), F.pixel_unshuffle(squares, 2))
    for i in range(2):
        for j in range(2):
            assert torch.equal(views[:, 2 * i + j], squares[:, :, i::2, j::2])


def test_tiles_are_the_quarters_row_by_row():
    squares = torch.randn(2, 3, 8, 8)
    views = high_views(squares, "tiles")
    for i in range(2):
        for j in range(2):
            assert torch.equal(views[:, 2 * i + j], squares[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4])


def test_low_view_keeps_the_corners():
    squares = torch.randn(1, 3, 8, 8)
    low = low_view(squares, 4)
    assert torch.equal(low[..., [0, 0, -1, -1], [0, -1, 0, -1]], squares[..., [0, 0, -1, -1], [0, -1, 0, -1]])


def test_name_tells_apart_what_gives_other_states(folders: tuple[Path, Path], towers: TwoTowers):
    spec = detail(folders)
    first, second = spec.towers
    others = [
        spec.model_copy(update={"split": "tiles"}),
        spec.model_copy(update={"towers": (first.model_copy(update={"block": 2}), second)}),
        spec.model_copy(update={"towers": (first, second.model_copy(update={"shallow": (0, 1, 2)}))}),
        spec.model_copy(update={"side": 56}),
    ]
    variant = load_variant("toybox").model_copy(update={"detail": spec})
    source = feature_source(variant, "realcustom_pp")
    assert source.name == towers.name
    changed = [feature_source(variant.model_copy(update={"detail": other}), "realcustom_pp") for other in others]
    for value in ("name", "weights", "digest"):
        assert len({getattr(source, value), *(getattr(other, value) for other in changed)}) == 5


def test_which_encoder_is_read_follows_the_method():
    variant = load_variant("toybox")
    for method in ("mfi", "ip_adapter_plus", "realcustom"):
        source = feature_source(variant, method)
        assert (source.spec, source.layers) == (variant.image_encoder, variant.image_encoder.layers)
        assert source.canvas(64) == 64
    pp = FeatureParams(encoder="realcustom_pp").source(variant)
    assert (pp.spec, pp.layers, pp.canvas(64), pp.canvas(512)) == (variant.detail, (0, 1, 2, 3, 4), 128, 512)
    views = FeatureParams(encoder="realcustom_pp", projector=ViewParams(high=False, shallow=True))
    assert views.source(variant).layers == (0, 5, 6, 7)
    with pytest.raises(
        ModelError, match="variant 'toybox' has no 'detail', the two image towers of realcustom_pp; add"
    ):
        feature_source(variant.model_copy(update={"detail": None}), "realcustom_pp")


@pytest.mark.parametrize("method", ["mfi", "realcustom_pp"])
def test_shape_and_name_known_before_loading_are_those_of_the_encoder(method: str, photos: list[Image.Image]):
    source = feature_source(load_variant("toybox"), method)
    encoder = source.load("cpu", batch_size=2)
    assert encoder.hidden_states(photos[:1], source.layers).shape == (1, *source.shape)
    assert source.shape == {"mfi": (3, 65, 128), "realcustom_pp": (5, 64, 256)}[method]
    assert encoder.name == source.name


def test_toybox_s_towers_are_its_clip_and_dino(photos: list[Image.Image]):
    """A square of the encoders' own side, enlarged: the corners of the low view are the photo's."""
    source = feature_source(load_variant("toybox"), "realcustom_pp", shallow=True)
    towers = source.load("cpu", batch_size=1)
    assert isinstance(towers, TwoTowers)
    square = photos[0].convert("RGB").resize((128, 128))
    low = low_view(towers.preprocess(square)[None].float() / 255, 64)
    clip = load_clip(ClipSpec(path="weights/toybox/clip"), "cpu", batch_size=1)
    hidden = towers.hidden_states([square], source.layers)
    ready = after_preparing(clip).hidden_states([(low[0] - 0.5) / 0.5], [1, 2, 3, 4])[:, :, 1:]
    torch.testing.assert_close(hidden[:, [5, 6, 7, 0], :, :128], ready)
    dino = Dinov2Model.from_pretrained("weights/toybox/dino", dtype=torch.float32).eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    with torch.no_grad():
        states = dino((low - mean) / std, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden[0, 0, :, 128:], states[5][0, 1:])


def test_black_features_are_those_of_a_black_photo(towers: TwoTowers):
    found = black_features(towers, range(5))
    assert torch.equal(found, towers.hidden_states([Image.new("RGB", (90, 40))], range(5)))
    assert not torch.equal(found, towers.hidden_states([Image.new("RGB", (9, 9), "white")], range(5)))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_published_towers_are_pinned_and_joined_to_2176(name: str):
    spec = load_variant(name).detail
    assert spec is not None and (spec.side, spec.split) == (384, "interleave")
    assert [(tower.kind, tower.block, tower.shallow) for tower in spec.towers] == [
        ("siglip", 25, (7, 13, 19)),
        ("dino", 22, (4, 10, 16)),
    ]
    assert all(tower.is_hub_id and tower.revision for tower in spec.towers)


@pytest.mark.parametrize(("shallow", "layers"), [(False, 5), (True, 8)])
def test_published_sizes_give_729_tokens_of_2176(tmp_path: Path, shallow: bool, layers: int):
    """384 is no multiple of 14: 27 patches a side, and six pixels are lost."""
    so400m = {"hidden_size": 1152, "image_size": 384, "patch_size": 14}
    SiglipConfig(vision_config=so400m).save_pretrained(tmp_path / "siglip")
    Dinov2WithRegistersConfig(hidden_size=1024, image_size=518, patch_size=14).save_pretrained(tmp_path / "dino")
    variant = load_variant("sdxl")
    places = [{"path": str(tmp_path / part), "revision": None} for part in ("siglip", "dino")]
    pair = [tower.model_copy(update=place) for tower, place in zip(variant.detail.towers, places, strict=True)]
    here = variant.model_copy(update={"detail": variant.detail.model_copy(update={"towers": tuple(pair)})})
    assert feature_source(here, "realcustom_pp", shallow=shallow).shape == (layers, 729, 2176)


@pytest.mark.parametrize(
    ("place", "change", "said"),
    [
        (0, {"block": 5}, r"block 5 is beyond its blocks 0\.\.4"),
        (1, {"shallow": (1, 2, 9)}, r"block 9 is beyond its blocks 0\.\.4"),
        (0, {"kind": "dino"}, "cannot be read as a transformers folder of DINO, DINOv2 or DINOv3"),
        (0, {"path": "nowhere/at all"}, "nowhere/at all: no such file or folder"),
    ],
)
def test_tower_that_does_not_fit_is_one_sentence(
    folders: tuple[Path, Path], place: int, change: dict[str, Any], said: str
):
    spec = detail(folders)
    pair = [tower.model_copy(update=change if n == place else {}) for n, tower in enumerate(spec.towers)]
    with pytest.raises(ModelError, match=said) as caught:
        load_towers(spec.model_copy(update={"towers": tuple(pair)}), "cpu")
    assert "\n" not in str(caught.value)


def test_side_that_a_tower_does_not_read_is_one_sentence(folders: tuple[Path, Path]):
    with pytest.raises(ModelError, match=r"reads images of 28 px, but the variant's detail\.side is 56"):
        load_towers(detail(folders, side=56), "cpu")


def test_towers_with_other_patches_are_one_sentence(folders: tuple[Path, Path], tmp_path: Path):
    config = Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=5, num_attention_heads=2, image_size=28, patch_size=7
    )
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    BitImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"at 28 px '.*' has 9 tokens, but '.*' has 16"):
        load_towers(detail((folders[0], tmp_path)), "cpu")


def test_hub_id_without_a_revision_is_refused():
    tree = json.loads(load_variant("sdxl").model_dump_json())
    tree["detail"]["towers"][1]["revision"] = None
    with pytest.raises(ValueError, match=r"'facebook/dinov2-with-registers-large' is not a local path"):
        Variant.model_validate(tree)
