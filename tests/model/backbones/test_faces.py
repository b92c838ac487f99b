"""Face recognisers: which tokens are read, the ID vector, and what is wrong with a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from model.backbones.encoders import after_preparing, load_encoder
from model.backbones.features.face import IDENTITY, FaceRecogniser, load_faces, load_recogniser
from model.backbones.features.source import FeatureParams, adapter_source, feature_source
from model.backbones.variant import RecogniserSpec, Spec, Variant, load_variant
from runtime.errors import ModelError
from tests.world.faces import BLOCKS, COLUMNS, ID_WIDTH, LAYERS, SIDE, WIDTH, face_spec, write_recogniser

KINDS = ("vit", "dinov2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind of network."""
    root = tmp_path_factory.mktemp("faces")
    for kind in (*KINDS, "resnet"):
        write_recogniser(root / kind, kind)
    return root


@pytest.fixture(scope="module")
def faces() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(3)
    sizes = [(20, 30), (16, 16), (40, 24)]
    arrays = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=generator).numpy() for w, h in sizes]
    return [Image.fromarray(array) for array in arrays]


def variant(folder: Path, kind: str = "vit") -> Variant:
    return load_variant("toybox").model_copy(update={"face": face_spec(folder / kind)})


def block_outputs(net: FaceRecogniser, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Tokens after each block, by hooks."""
    found: list[torch.Tensor] = []
    blocks = [module for module in net.network.modules() if type(module).__name__ in ("ViTLayer", "Dinov2Layer")]
    hooks = [
        block.register_forward_hook(lambda module, inputs, out: found.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    net(pixels)
    for hook in hooks:
        hook.remove()
    assert len(found) == BLOCKS
    return found


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_are_tokens_after_the_blocks_and_the_id_vector(folder, faces, kind, pool):
    spec = face_spec(folder / kind, pool=pool)
    loaded, net = load_faces(spec, "cpu"), load_recogniser(spec).eval()
    v = loaded.hidden_states(faces, (0,))
    assert v.shape == (3, 1, 1, COLUMNS) and COLUMNS == 3 * WIDTH + ID_WIDTH and net.width == COLUMNS
    with torch.no_grad():
        pixels = torch.stack([loaded.preprocess(face) for face in faces])
        states = block_outputs(net, pixels)
        last = next(module for name, module in net.network.named_modules() if name == "layernorm")(states[-1])
        tokens = [s[:, 0] if pool == "cls" else s[:, 1:].mean(dim=1) for s in (states[1], states[3], states[5], last)]
        linear = load_file(folder / kind / IDENTITY)
        expected = torch.cat([*tokens[:3], F.linear(tokens[3], linear["weight"], linear["bias"])], dim=-1)
    torch.testing.assert_close(v[:, 0, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "resnet"])
def test_embedding_is_the_unit_id_vector_whatever_else_is_read(folder, faces, kind):
    encoder = load_encoder("face", Spec(path=str(folder / kind)), "cpu", batch_size=2)
    found = encoder.embed([encoder.prepare(face) for face in faces])
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    assert encoder.embed([]).shape == (0, ID_WIDTH) and encoder.encode_text is None
    if kind != "resnet":
        whole = load_faces(face_spec(folder / kind), "cpu").hidden_states(faces, (0,))[:, 0, 0]
        torch.testing.assert_close(found, F.normalize(whole[:, -ID_WIDTH:], dim=-1), rtol=1e-5, atol=1e-5)


def test_pooling_of_the_spec_holds_for_the_embedding_too(folder, faces):
    by_token, by_mean = (
        load_encoder("face", RecogniserSpec(path=str(folder / "vit"), pool=pool), "cpu", 1) for pool in ("cls", "mean")
    )
    one = [by_token.prepare(faces[0])]
    assert not torch.allclose(by_token.embed(one), by_mean.embed(one), atol=1e-3)


def test_source_of_a_trained_recogniser_hands_on_the_faces_themselves(folder, faces):
    named = variant(folder)
    trained, frozen = (feature_source(named, "dreamidentity", trained=on) for on in (True, False))
    assert trained.layers == (0, 1, 2) and trained.shape == (3, SIDE, SIDE)
    assert frozen.layers == (0,) and frozen.shape == (1, 1, COLUMNS)
    encoder = trained.load("cpu")
    found = encoder.hidden_states(faces, trained.layers)
    assert torch.equal(found, torch.stack([encoder.preprocess(face) for face in faces]))
    assert encoder.name == trained.name != frozen.name == frozen.load("cpu").name
    assert trained.digest != frozen.digest and trained.weights == frozen.weights
    with pytest.raises(ModelError, match=r"layers \[0\] were asked for; it has \[0, 1, 2\]"):
        encoder.hidden_states(faces, (0,))
    assert encoder.hidden_states([], trained.layers).shape == (0, 3, SIDE, SIDE)


@pytest.mark.parametrize("pixels", [True, False])
def test_photos_that_are_prepared_already_are_read_alike(folder, faces, pixels):
    encoder = load_faces(face_spec(folder / "vit"), "cpu", batch_size=2, pixels=pixels)
    layers = (0, 1, 2) if pixels else (0,)
    ready = after_preparing(encoder).hidden_states([encoder.preprocess(face) for face in faces], layers)
    assert torch.equal(ready, encoder.hidden_states(faces, layers))


def test_params_and_adapters_say_which_of_the_two_is_read(folder):
    named = variant(folder)
    for train, layers in (("all", (0, 1, 2)), ("projector", (0,))):
        params = FeatureParams.model_validate({"encoder": "dreamidentity", "face": {"train": train, "scales": "all"}})
        source = params.source(named)
        assert source.layers == layers and adapter_source(named, "dreamidentity", layers) == source


def test_another_network_or_other_layers_are_another_source(folder):
    names = {feature_source(variant(folder, kind), "dreamidentity").digest for kind in KINDS}
    changed = variant(folder).model_copy(update={"face": face_spec(folder / "vit", layers=(1, 3))})
    assert len(names | {feature_source(changed, "dreamidentity").digest}) == 3


def test_variant_without_a_recogniser_is_one_sentence():
    with pytest.raises(ModelError, match="variant 'toybox' has no 'face', the face recogniser of dreamidentity"):
        feature_source(load_variant("toybox"), "dreamidentity")


def test_metric_that_measures_with_the_network_that_is_trained_on_is_refused(folder):
    tree = load_variant("toybox").model_dump()
    here = {"path": str(folder / "vit")}
    Variant.model_validate(tree | {"face": here | {"layers": LAYERS}, "face_metric": {"path": str(folder / "resnet")}})
    with pytest.raises(ValidationError, match="measure with another than is trained on"):
        Variant.model_validate(tree | {"face": here | {"layers": LAYERS}, "face_metric": here})


def test_weights_are_those_of_the_file_and_nothing_is_dropped_out(folder, tmp_path):
    write_recogniser(tmp_path, "dinov2", seed=7)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.5, "drop_path_rate": 0.5}))
    net = load_recogniser(face_spec(tmp_path)).train()
    pixels = torch.randn(2, 3, SIDE, SIDE)
    assert torch.equal(net(pixels), net(pixels))
    stored = load_file(tmp_path / "model.safetensors")
    assert all(any(torch.equal(p, value) for value in stored.values()) for p in net.network.parameters())
    assert not any("mask_token" in name for name, _ in net.named_parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / IDENTITY).unlink(), "cannot be read as the Linear of an ID vector"),
        (lambda folder: save_file({"weight": torch.zeros(4, WIDTH)}, folder / IDENTITY), "1 missing weights"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "clip"}'), "its model_type is clip"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "cannot be read as a transformers folder"),
        (lambda folder: resized(folder, 24), "its image processor gives"),
    ],
)
def test_folder_that_is_not_one_is_one_sentence(tmp_path, change, said):
    write_recogniser(tmp_path)
    change(tmp_path)
    with pytest.raises(ModelError, match=said):
        load_faces(face_spec(tmp_path), "cpu")


def resized(folder: Path, side: int) -> None:
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"height": side, "width": side}}))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_block_that_does_not_exist_is_one_sentence(folder, kind):
    with pytest.raises(ModelError, match=r"block 6 is beyond its blocks 0\.\."):
        load_faces(face_spec(folder / kind, layers=(1, BLOCKS)), "cpu")


def test_layers_ascend(folder):
    with pytest.raises(ValidationError, match="ascending order"):
        face_spec(folder / "vit", layers=(3, 1))
