"""The reward model: the published checkpoint under its own names, our folder, and what a score depends on."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from model.backbones.reward import (
    CHECKPOINT,
    MED_CONFIG,
    PIXEL_MEAN,
    PIXEL_STD,
    PUBLISHED,
    TOKENIZER,
    WEIGHTS,
    Reward,
    RewardConfig,
    RewardModel,
    load_reward,
    preprocess,
    published_config,
    renamed,
    save_config,
)
from model.backbones.variant import Spec
from runtime.errors import ModelError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "mug", "on", "the", "beach", ","]
PROMPTS = ["a red mug", "a blue mug on the beach", "", "a red mug", "mug, " * 40, "the beach", "a mug", "a", "a zebra"]
MED = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 40,
    "vocab_size": len(WORDS) + 2,  # two more than the tokenizer's own, as published
    "layer_norm_eps": 1e-12,
    "encoder_width": 32,  # not the image encoder's width: the published file is wrong there too
    "add_cross_attention": True,
}
PUBLISHED_MED = MED | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 512,
    "vocab_size": 30524,
    "encoder_width": 768,
}


def published_state(
    med: dict, blocks: int, width: int, mlp: int, size: int, patch: int, head: tuple[int, ...], device: str
) -> dict[str, Tensor]:
    """A state dict with the names and shapes of THUDM/ImageReward's modules, random weights."""
    state: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(0)

    def add(name: str, *shape: int) -> None:
        if device == "meta":
            state[name] = torch.empty(shape, device="meta")
        else:
            state[name] = torch.randn(shape, generator=draw) * (2 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.5)

    def linear(name: str, out: int, inside: int) -> None:
        add(f"{name}.weight", out, inside)
        add(f"{name}.bias", out)

    def norm(name: str, channels: int) -> None:
        add(f"{name}.weight", channels)
        add(f"{name}.bias", channels)

    image, text = "blip.visual_encoder", "blip.text_encoder"
    add(f"{image}.cls_token", 1, 1, width)
    add(f"{image}.pos_embed", 1, 1 + (size // patch) ** 2, width)
    add(f"{image}.patch_embed.proj.weight", width, 3, patch, patch)
    add(f"{image}.patch_embed.proj.bias", width)
    for block in (f"{image}.blocks.{i}" for i in range(blocks)):
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", mlp, width)
        linear(f"{block}.mlp.fc2", width, mlp)
    norm(f"{image}.norm", width)
    wide, positions = med["hidden_size"], med["max_position_embeddings"]
    state[f"{text}.embeddings.position_ids"] = torch.arange(positions, device=device)[None]
    add(f"{text}.embeddings.word_embeddings.weight", med["vocab_size"], wide)
    add(f"{text}.embeddings.position_embeddings.weight", positions, wide)
    norm(f"{text}.embeddings.LayerNorm", wide)
    for layer in (f"{text}.encoder.layer.{i}" for i in range(med["num_hidden_layers"])):
        for attention, source in (("attention", wide), ("crossattention", width)):
            linear(f"{layer}.{attention}.self.query", wide, wide)
            linear(f"{layer}.{attention}.self.key", wide, source)
            linear(f"{layer}.{attention}.self.value", wide, source)
            linear(f"{layer}.{attention}.output.dense", wide, wide)
            norm(f"{layer}.{attention}.output.LayerNorm", wide)
        linear(f"{layer}.intermediate.dense", med["intermediate_size"], wide)
        linear(f"{layer}.output.dense", wide, med["intermediate_size"])
        norm(f"{layer}.output.LayerNorm", wide)
    linear("blip.vision_proj", 256, width)
    linear("blip.text_proj", 256, wide)
    widths = (wide, *head, 1)
    for place, out, inside in zip((0, 2, 4, 6, 7), widths[1:], widths[:-1], strict=True):
        linear(f"mlp.layers.{place}", out, inside)
    return state


def published_reward(state: dict[str, Tensor], med: dict, pixels: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """Rewards [B], written out over the published names after med.py, vit.py and ImageReward.py of the two papers."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        if seen is not None:
            logits = logits.masked_fill(seen[:, None, None] == 0, -torch.inf)
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)

    image, text = "blip.visual_encoder", "blip.text_encoder"
    weight, bias = (state[f"{image}.patch_embed.proj.{part}"] for part in ("weight", "bias"))
    x = F.conv2d(pixels, weight, bias, stride=weight.shape[-1]).flatten(2).mT
    x = torch.cat([state[f"{image}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{image}.pos_embed"]
    for i in range(2):
        block = f"{image}.blocks.{i}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, v, x.shape[-1] // 64))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    x = norm(f"{image}.norm", x, 1e-6)
    y = state[f"{text}.embeddings.word_embeddings.weight"][words]
    y = y + state[f"{text}.embeddings.position_embeddings.weight"][: words.shape[1]]
    y = norm(f"{text}.embeddings.LayerNorm", y, 1e-12)
    for i in range(med["num_hidden_layers"]):
        layer = f"{text}.encoder.layer.{i}"
        for kind, source, seen in (("attention", None, mask), ("crossattention", x, None)):
            part, over = f"{layer}.{kind}", y if source is None else source
            q, k, v = (linear(f"{part}.self.{n}", z) for n, z in (("query", y), ("key", over), ("value", over)))
            found = linear(f"{part}.output.dense", attend(q, k, v, med["num_attention_heads"], seen))
            y = norm(f"{part}.output.LayerNorm", found + y, 1e-12)
        hidden = F.gelu(linear(f"{layer}.intermediate.dense", y))
        y = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", hidden) + y, 1e-12)
    z = y[:, 0]
    for place in (0, 2, 4, 6, 7):
        z = linear(f"mlp.layers.{place}", z)
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


def write_published(folder: Path) -> dict[str, Tensor]:
    """The published files at a small size, with the vocabulary beside them; returns the state dict."""
    folder.mkdir(exist_ok=True)
    state = published_state(MED, 2, 128, 160, 32, 8, (24, 16, 12, 8), "cpu")
    torch.save(state, folder / CHECKPOINT)
    (folder / MED_CONFIG).write_text(json.dumps(MED))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return state


def write_own(folder: Path) -> RewardModel:
    """Our folder, half precision, with weights large enough that rewards differ."""
    torch.manual_seed(1)
    model = RewardModel(
        RewardConfig(
            image_size=32,
            patch_size=8,
            vision_layers=2,
            vision_width=32,
            vision_heads=2,
            vision_mlp=48,
            vocabulary=len(WORDS),
            text_layers=2,
            text_width=32,
            text_heads=2,
            text_mlp=48,
            positions=16,
            length=16,
            head=(16, 8),
            dropout=(0.5,),
            mean=0.25,
            std=0.5,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
    folder.mkdir(exist_ok=True)
    save_config(model.config, folder)
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, folder / WEIGHTS)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return model


@pytest.fixture(scope="module")
def published_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    write_published(folder)
    return folder


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    write_own(folder)
    return folder


@pytest.fixture(scope="module")
def reward(own_folder: Path) -> Reward:
    return load_reward(Spec(path=str(own_folder)), "cpu", batch_size=4)


def test_published_checkpoint_scores_as_its_own_code_does(published_folder: Path, photos: list[Image.Image]) -> None:
    reward = load_reward(Spec(path=str(published_folder)), "cpu", batch_size=4)
    state = torch.load(published_folder / CHECKPOINT, weights_only=True)
    said = reward.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    pixels = torch.stack([preprocess(32)(photo) for photo in photos])
    expected = published_reward(state, MED, pixels, said["input_ids"], said["attention_mask"])
    assert torch.allclose(reward.score(photos, PROMPTS), expected, rtol=0, atol=1e-4 * float(expected.std()))
    assert reward.model.config.length == 35
    assert said["input_ids"][0, :5].tolist() == [WORDS.index(w) for w in ("[CLS]", "a", "red", "mug", "[SEP]")]


def test_every_published_name_is_used_or_ignored_and_every_parameter_is_filled() -> None:
    state = published_state(PUBLISHED_MED, 24, 1024, 4096, 224, 16, (1024, 128, 64, 16), "meta")
    config = published_config(PUBLISHED_MED, state)
    assert (config.image_size, config.vision_heads, config.text_heads) == (224, 16, 12)
    assert (config.mean, config.std, config.head) == (0.16717362830052426, 1.0333394966054072, (1024, 128, 64, 16))
    with torch.device("meta"):
        model = RewardModel(config)
    found = renamed(state)
    assert {key: value.shape for key, value in found.items()} == {k: v.shape for k, v in model.state_dict().items()}
    unused = [key for key in state if key.startswith(("blip.vision_proj", "blip.text_proj")) or "position_ids" in key]
    assert len(state) == len(found) + len(unused) == len(found) + 5
    assert {type(layer).__name__: layer for layer in model.head}["Dropout"].p == 0.1
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(446e6, rel=0.02)


def test_published_files_are_pinned_to_commits() -> None:
    for spec in (PUBLISHED, TOKENIZER):
        assert spec.is_hub_id and spec.revision is not None and len(spec.revision) == 40


def test_score_does_not_depend_on_its_neighbours(reward: Reward, photos: list[Image.Image]) -> None:
    rewards = reward.score(photos, PROMPTS)
    alone = torch.cat([reward.score([photo], [prompt]) for photo, prompt in zip(photos, PROMPTS, strict=True)])
    assert torch.equal(rewards, alone)
    assert rewards.shape == (len(photos),) and rewards.dtype == torch.float32
    assert len(set(rewards.tolist())) == len(photos)
    assert reward.score([], []).shape == (0,)


def test_score_depends_on_the_prompt_and_on_the_photo(reward: Reward, photos: list[Image.Image]) -> None:
    first, second, other = reward.score([photos[0], photos[1], photos[0]], ["a red mug", "a red mug", "a blue mug"])
    assert first != second and first != other


def test_arrays_and_tensors_score_as_photos_do(reward: Reward, photos: list[Image.Image]) -> None:
    square = [photo.resize((32, 32)) for photo in photos]
    array = np.stack([np.asarray(photo) for photo in square])
    rewards = reward.score(square, PROMPTS)
    assert torch.equal(reward.score(array, PROMPTS), rewards)
    assert torch.equal(reward.score(torch.from_numpy(array), PROMPTS), rewards)


def test_rewards_are_standardised_and_dropout_is_off(own_folder: Path, reward: Reward) -> None:
    config = reward.model.config
    assert not reward.model.training
    assert reward.model.reward(torch.zeros(3, config.text_width)).shape == (3,)
    raw = reward.model.head(torch.ones(config.text_width))[0]
    assert reward.model.reward(torch.ones(config.text_width)) == pytest.approx(float((raw - 0.25) / 0.5), rel=1e-5)


def test_preprocessing_resizes_the_shorter_side_crops_and_normalises() -> None:
    photo = Image.new("RGB", (40, 20), (255, 0, 0))
    photo.paste((0, 0, 255), (10, 0, 30, 20))
    pixels = preprocess(10)(photo)
    blue = [(value - mean) / std for value, mean, std in zip((0, 0, 1), PIXEL_MEAN, PIXEL_STD, strict=True)]
    assert pixels.shape == (3, 10, 10)
    assert torch.allclose(pixels[:, 5, 5], torch.tensor(blue), atol=1e-4)


def test_each_fault_of_a_folder_is_one_sentence(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(ModelError) as caught:
            load_reward(Spec(path=str(tmp_path)), "cpu")
        return str(caught.value)

    assert "config.json" in message()
    state = {key: value.half() for key, value in write_own(tmp_path).state_dict().items()}
    save_file({key: value for key, value in state.items() if key != "head.0.bias"}, tmp_path / WEIGHTS)
    assert "1 missing weights, first 'head.0.bias'" in message()
    save_file(state | {"head.9.bias": torch.zeros(1)}, tmp_path / WEIGHTS)
    assert "1 unexpected weights, first 'head.9.bias'" in message()
    save_file(state | {"head.0.bias": torch.zeros(3)}, tmp_path / WEIGHTS)
    assert "'head.0.bias' is [3], expected [16]" in message()
    save_file(state, tmp_path / WEIGHTS)
    (tmp_path / "vocab.txt").unlink()
    assert "vocab.txt" in message()


def test_unknown_published_name_is_an_error(tmp_path: Path) -> None:
    state = write_published(tmp_path)
    torch.save(state | {"blip.itm_head.weight": torch.zeros(2, 48)}, tmp_path / CHECKPOINT)
    with pytest.raises(ModelError, match=r"'blip\.itm_head\.weight'"):
        load_reward(Spec(path=str(tmp_path)), "cpu")


def test_pickled_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    write_published(tmp_path)
    torch.save({"mlp.layers.0.weight": Path("/")}, tmp_path / CHECKPOINT)
    with pytest.raises(ModelError, match="cannot be read"):
        load_reward(Spec(path=str(tmp_path)), "cpu")


def test_as_many_prompts_as_images(reward: Reward, photos: list[Image.Image]) -> None:
    with pytest.raises(ModelError, match="2 images and 1 prompts"):
        reward.score(photos[:2], ["a mug"])


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="vision_heads 3 does not divide vision_width 32"):
        RewardConfig(
            image_size=32, patch_size=8, vision_layers=1, vision_width=32, vision_heads=3, vision_mlp=8,
            vocabulary=9, text_layers=1, text_width=8, text_heads=1, text_mlp=8,
        )  # fmt: skip
