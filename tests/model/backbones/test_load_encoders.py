"""The image encoders: CLIP from an open_clip folder, DINOv2 from a transformers folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, Dinov2Model, ViTConfig, ViTImageProcessor, ViTModel

from model.backbones.clip import WEIGHTS, Clip, load_clip
from model.backbones.variant import ClipSpec, DinoSpec
from model.backbones.vision import Vision, load_dino
from runtime.errors import ModelError

CAPTIONS = ["a mug", "a photo of a teddy bear on a long, long beach at the end of the summer", "", "dog", "a mug"]


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Clip:
    return load_clip(ClipSpec(path=str(clip_folder)), "cpu", batch_size=4)


@pytest.fixture(scope="module")
def dino(dino_folder: Path) -> Vision:
    return load_dino(DinoSpec(path=str(dino_folder)), "cpu", batch_size=4)


def same_bits_in_any_company(encode: Callable[[list], Tensor], rows: list) -> bool:
    """Whether each row gives the same bits alone, among all rows, and among all rows in reverse."""
    alone = torch.cat([encode([row]) for row in rows])
    return torch.equal(encode(rows), alone) and torch.equal(encode(rows[::-1]).flip(0), alone)


def test_clip_image_embedding_does_not_depend_on_its_neighbours(clip: Clip, photos: list[Image.Image]) -> None:
    assert same_bits_in_any_company(clip.encode_image, photos)


def test_clip_hidden_states_do_not_depend_on_their_neighbours(clip: Clip, photos: list[Image.Image]) -> None:
    assert same_bits_in_any_company(lambda rows: clip.hidden_states(rows, [0, 2]), photos)


def test_clip_text_embedding_does_not_depend_on_its_neighbours(clip: Clip) -> None:
    assert same_bits_in_any_company(clip.encode_text, CAPTIONS)


def test_dino_embedding_does_not_depend_on_its_neighbours(dino: Vision, photos: list[Image.Image]) -> None:
    assert same_bits_in_any_company(dino.encode_image, photos)


def test_embeddings_are_unit_float32_rows_that_differ(clip: Clip, dino: Vision, photos: list[Image.Image]) -> None:
    for rows, width in (
        (clip.encode_image(photos), 24),
        (clip.encode_text(CAPTIONS[:4]), 24),
        (dino.encode_image(photos), 32),
    ):
        assert rows.shape == (len(rows), width)
        assert rows.dtype == torch.float32
        assert not rows.requires_grad
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
        assert len(rows.unique(dim=0)) == len(rows)


def test_no_photos_give_no_rows(clip: Clip, dino: Vision) -> None:
    assert clip.encode_image([]).shape == (0, 24)
    assert clip.encode_text([]).shape == (0, 24)
    assert clip.hidden_states([], [1, 2]).shape == (0, 2, 17, 32)
    assert dino.encode_image([]).shape == (0, 32)


def test_clip_agrees_with_open_clip(clip: Clip, clip_folder: Path, photos: list[Image.Image]) -> None:
    """Weights, preprocessing and tokens are the folder's own, read by the library it was made for."""
    model = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    pixels = torch.stack([transform(photo) for photo in photos])
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_folder}")(CAPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_image(photos), model.encode_image(pixels, normalize=True))
        torch.testing.assert_close(clip.encode_text(CAPTIONS), model.encode_text(tokens, normalize=True))


def test_hidden_state_k_is_the_output_of_block_k_with_the_class_token_first(
    clip: Clip, photos: list[Image.Image]
) -> None:
    seen: dict[int, Tensor] = {}
    blocks = clip.model.visual.transformer.resblocks
    hooks = [
        block.register_forward_hook(lambda _, __, out, index=index: seen.update({index: out}))
        for index, block in enumerate(blocks)
    ]
    embedding = clip.encode_image(photos[:4])
    for hook in hooks:
        hook.remove()
    states = clip.hidden_states(photos[:4], [0, 1, 3])
    assert states.shape == (4, 3, 1 + 4 * 4, 32)
    assert torch.equal(states, torch.stack([seen[0], seen[1], seen[3]], dim=1))
    visual = clip.model.visual
    torch.testing.assert_close(F.normalize(visual.ln_post(states[:, -1, 0]) @ visual.proj, dim=-1), embedding)


@pytest.mark.parametrize("layers", [[], [4], [-1], [2, 1], [1, 1]])
def test_layers_the_encoder_lacks_are_refused(clip: Clip, photos: list[Image.Image], layers: list[int]) -> None:
    with pytest.raises(ModelError, match=r"must ascend within its blocks 0\.\.3"):
        clip.hidden_states(photos, layers)


def test_convolutional_clip_embeds_but_has_no_hidden_states(tmp_path: Path, photos: list[Image.Image]) -> None:
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    save_file(open_clip.CLIP(**config).state_dict(), tmp_path / WEIGHTS)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    clip = load_clip(ClipSpec(path=str(tmp_path)), "cpu", batch_size=4)
    assert clip.encode_image(photos[:1]).shape == (1, 16)
    with pytest.raises(ModelError, match="hidden states need a VisionTransformer, but this is a ModifiedResNet"):
        clip.hidden_states(photos, [0])


def test_half_precision_encoders_stay_close(clip_folder: Path, dino_folder: Path, photos: list[Image.Image]) -> None:
    clips = [load_clip(ClipSpec(path=str(clip_folder)), "cpu", dtype) for dtype in (torch.float32, torch.bfloat16)]
    dinos = [load_dino(DinoSpec(path=str(dino_folder)), "cpu", dtype) for dtype in (torch.float32, torch.bfloat16)]
    for full, half in (clips, dinos):
        cosine = (full.encode_image(photos) * half.encode_image(photos)).sum(1)
        assert half.encode_image(photos).dtype == torch.float32
        assert cosine.min() > 0.99


def test_dino_is_the_class_token_after_the_final_norm(
    dino: Vision, dino_folder: Path, photos: list[Image.Image]
) -> None:
    model = Dinov2Model.from_pretrained(dino_folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(dino_folder)
    with torch.no_grad():
        pooled = model(**processor(images=photos, return_tensors="pt")).pooler_output
    torch.testing.assert_close(dino.encode_image(photos), F.normalize(pooled, dim=1))


def test_first_dino_is_known_by_its_folder(tmp_path: Path, photos: list[Image.Image]) -> None:
    """As facebook/dino-vits16 is published: a ViTModel without a pooling layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    whole = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16), add_pooling_layer=False).eval()
    whole.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        states = whole(**processor(images=photos, return_tensors="pt")).last_hidden_state
    found = load_dino(DinoSpec(path=str(tmp_path)), "cpu", batch_size=4).encode_image(photos)
    torch.testing.assert_close(found, F.normalize(states[:, 0], dim=1))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "swin"}))
    with pytest.raises(ModelError, match=r"cannot be read as a transformers folder of DINO.*its model_type is swin"):
        load_dino(DinoSpec(path=str(tmp_path)), "cpu")


def test_published_dinov2_names_are_the_ones_on_disk(dino_folder: Path) -> None:
    names = set(load_file(dino_folder / "model.safetensors"))
    assert {"embeddings.mask_token", "encoder.layer.0.attention.attention.query.weight", "layernorm.weight"} <= names


def test_encoder_id_names_the_weights(clip: Clip, clip_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(clip_folder, tmp_path / clip_folder.name))
    assert load_clip(ClipSpec(path=str(copy)), "cpu").name == clip.name
    assert clip.name == f"{clip_folder.name}@{clip.revision[:12]}"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (WEIGHTS, None, "clip: cannot be read as an open_clip folder .* is missing"),
        (WEIGHTS, b"\xff" * 40, "clip: cannot be read as an open_clip folder"),
        ("open_clip_config.json", None, "clip: cannot be read as an open_clip folder"),
        ("open_clip_config.json", b"{}", "clip: cannot be read as an open_clip folder"),
    ],
)
def test_unreadable_clip_is_one_sentence(
    clip_folder: Path, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_clip(ClipSpec(path=str(folder)), "cpu")
    assert "\n" not in str(caught.value)


def test_clip_with_a_wrong_key_is_one_sentence(clip_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    state = load_file(folder / WEIGHTS)
    state["visual.projection"] = state.pop("visual.proj")
    save_file(state, folder / WEIGHTS)
    with pytest.raises(ModelError, match="clip: cannot be read as an open_clip folder") as caught:
        load_clip(ClipSpec(path=str(folder)), "cpu")
    assert "\n" not in str(caught.value)


def test_unreadable_dino_is_one_sentence(dino_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dino_folder, tmp_path / "dino"))
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "layernorm.bias"}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"dino: 1 missing weights for .*, first 'layernorm.bias'; replace the file"):
        load_dino(DinoSpec(path=str(folder)), "cpu")
    (folder / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ModelError, match="dino: cannot be read as a transformers folder of DINO, DINOv2 or DINOv3"):
        load_dino(DinoSpec(path=str(folder)), "cpu")
    (folder / "preprocessor_config.json").unlink()
    shutil.copy(dino_folder / "model.safetensors", folder)
    with pytest.raises(ModelError, match="dino: cannot be read as a transformers folder of DINO, DINOv2 or DINOv3"):
        load_dino(DinoSpec(path=str(folder)), "cpu")
