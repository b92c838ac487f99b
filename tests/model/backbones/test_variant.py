import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import UNet2DConditionModel
from open_clip import CLIP, get_model_config

from model.backbones.diffusion import patterns
from model.backbones.hub import identify, resolve
from model.backbones.variant import ROOT, ClipSpec, Variant, load_variant
from runtime.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def tree() -> dict[str, Any]:
    """The toybox variant as plain data, to be spoiled."""
    tree: dict[str, Any] = json.loads((ROOT / "model" / "backbones" / "toybox.json").read_text())
    return tree


def load(tree: dict[str, Any], folder: Path) -> Variant:
    (folder / "mine.json").write_text(json.dumps(tree))
    return load_variant(str(folder / "mine.json"))


@pytest.mark.parametrize("name", ["toybox", "sd15", "sdxl", "faces"])
def test_shipped_variant_loads_and_pins_every_hub_id(name: str) -> None:
    variant = load_variant(name)
    assert variant.name == name
    for field in ("diffusion", "image_encoder", "clip", "dino", "detector", "sam", "reward"):
        spec = getattr(variant, field)
        if spec is None:
            assert field == "reward" and name == "faces"
            continue
        assert (spec.revision is not None) == spec.is_hub_id


def test_toybox_needs_no_network() -> None:
    variant = load_variant("toybox")
    fields = ("diffusion", "image_encoder", "clip", "dino", "detector", "sam", "reward")
    folders = ("diffusion", "clip", "clip", "dino", "detector", "sam", "reward")
    assert [getattr(variant, field).path for field in fields] == [f"weights/toybox/{part}" for part in folders]
    assert variant.lpips is None
    assert variant.resolution == 64


def test_unknown_variant_lists_the_known_ones() -> None:
    with pytest.raises(
        ModelError, match=r"^unknown variant 'sd3'; choose one of faces, sd15, sdxl, toybox, or give the path"
    ):
        load_variant("sd3")


def test_variant_may_be_a_file_of_ones_own(tree: dict[str, Any], tmp_path: Path) -> None:
    assert load(tree | {"name": "mine"}, tmp_path).name == "mine"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("clip", {"path": "openai/clip"}, "clip: 'openai/clip' is not a local path, and a hub id needs `revision`"),
        ("dino", {"path": "facebook/dinov2-base", "revision": "main"}, "dino.revision: 'main' is not a 40-hex commit"),
        ("dino", {"path": "weights/x", "depth": 3}, "dino.depth: Extra inputs are not permitted"),
        ("image_encoder", {"path": "weights/x"}, "image_encoder.layers: Field required"),
        ("image_encoder", {"path": "weights/x", "layers": [3, 3]}, r"image_encoder.layers: \[3, 3\] must be 0-based"),
        ("sam", {"path": "weights/x", "size": "vit_x"}, "sam.size: Input should be 'vit_b'"),
        ("resolution", 0, "resolution: Input should be greater than 0"),
        ("judge", {"path": "weights/x"}, "judge: Extra inputs are not permitted"),
    ],
)
def test_fault_names_file_and_key(tree: dict[str, Any], tmp_path: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(ModelError, match=f"^mine.json: {message}") as caught:
        load(tree | {key: value}, tmp_path)
    assert "\n" not in str(caught.value)


def test_broken_json_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(ModelError, match=r"^mine.json: not readable as JSON"):
        load_variant(str(tmp_path / "mine.json"))


def test_local_folder_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.backbones.variant.ROOT", tmp_path)
    (tmp_path / "laion" / "clip").mkdir(parents=True)
    assert resolve(ClipSpec(path="laion/clip"), []) == tmp_path / "laion" / "clip"
    assert resolve(ClipSpec(path="laion/clip", revision=COMMIT), []) == tmp_path / "laion" / "clip"
    assert resolve(ClipSpec(path=str(tmp_path / "laion")), []) == tmp_path / "laion"


def test_missing_local_path_is_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"^weights/none/clip: no such file or folder; put the weights there"):
        resolve(ClipSpec(path="weights/none/clip"), [])


def test_hub_id_is_fetched_at_its_commit_and_only_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    spec = ClipSpec(path="laion/clip", revision=COMMIT)
    assert resolve(spec, ["a.json"]) == tmp_path
    assert asked == {"name": "laion/clip", "revision": COMMIT, "allow_patterns": ["a.json"]}
    assert identify(spec, []) == ("laion/clip", COMMIT)


def test_hub_without_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=f"^laion/clip: revision {COMMIT} could not be fetched from the hub") as caught:
        resolve(ClipSpec(path="laion/clip", revision=COMMIT), ["*.json"])
    assert "\n" not in str(caught.value)


def test_identity_of_local_weights_follows_their_bytes_not_their_place(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    files = [tmp_path / folder / "w.safetensors" for folder in ("here", "there")]
    for file in files:
        file.write_bytes(b"weights")
    (here, first), (there, second) = (identify(ClipSpec(path=str(file.parent)), [file]) for file in files)
    assert (here, there) == ("here", "there")
    assert first == second
    files[1].write_bytes(b"Weights")
    assert identify(ClipSpec(path=str(files[1].parent)), [files[1]])[1] != first


def test_of_the_published_pipelines_only_the_needed_files_are_fetched() -> None:
    parts = (
        "unet/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
        "text_encoder/model",
        "text_encoder_2/model",
    )
    tokens = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
    needed = {f"{folder}/{file}" for folder in ("tokenizer", "tokenizer_2") for file in tokens}
    needed |= {f"{part}.fp16.safetensors" for part in parts} | {f"{part.split('/')[0]}/config.json" for part in parts}
    needed |= {"model_index.json", "scheduler/scheduler_config.json"}
    others = {
        f"{part}{kind}" for part in parts for kind in (".safetensors", ".bin", ".fp16.bin", ".non_ema.safetensors")
    }
    others |= {
        "v1-5-pruned.safetensors",
        "sd_xl_base_1.0.safetensors",
        "safety_checker/model.fp16.safetensors",
        "README.md",
    }
    fetched = {file for file in needed | others if any(fnmatch(file, pattern) for pattern in patterns(".fp16"))}
    assert fetched == needed


def test_image_encoder_layers_of_the_real_variants_end_at_the_second_last_block() -> None:
    with torch.device("meta"):
        model = CLIP(**get_model_config("ViT-H-14"))
    blocks = len(model.visual.transformer.resblocks)
    for name in ("sd15", "sdxl"):
        layers = load_variant(name).image_encoder.layers
        assert len(layers) == 3
        assert layers[-1] == blocks - 2


SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 768 + 1280,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}


@pytest.mark.parametrize(
    ("config", "cross_attentions", "groups", "parameters"),
    [({"cross_attention_dim": 768, "sample_size": 64}, 16, 16, 859_520_964), (SDXL, 70, 11, 2_567_463_684)],
    ids=["sd15", "sdxl"],
)
def test_real_unet_has_the_published_cross_attention_layers(
    config: dict[str, Any], cross_attentions: int, groups: int, parameters: int
) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    names = [name for name, _ in unet.named_modules()]
    assert sum(name.endswith(".attn2") for name in names) == cross_attentions
    assert sum(type(module).__name__ == "Transformer2DModel" for module in unet.modules()) == groups
    assert sum(p.numel() for p in unet.parameters()) == parameters
