import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from model.backbones.diffusion import Diffusion, load_diffusion, load_tokenizers, load_vae
from model.backbones.variant import DiffusionSpec
from model.prompt import caption_length
from runtime.errors import ModelError


def load(folder: Path, dtype: torch.dtype = torch.float32, weights: str | None = None) -> Diffusion:
    return load_diffusion(DiffusionSpec(path=str(folder), weights=weights), dtype, "cpu")  # type: ignore[arg-type]


@pytest.fixture
def spoiled(sd_folder: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline folder to spoil."""
    return Path(shutil.copytree(sd_folder, tmp_path / "pipeline"))


def test_stable_diffusion_folder_loads_frozen_with_every_weight(sd_folder: Path) -> None:
    diffusion = load(sd_folder)
    assert isinstance(diffusion.scheduler, PNDMScheduler)
    assert [len(diffusion.text_encoders), len(diffusion.tokenizers)] == [1, 1]
    for part in (diffusion.unet, diffusion.vae, *diffusion.text_encoders):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    stored = load_file(sd_folder / "text_encoder" / "model.safetensors")["text_model.final_layer_norm.weight"]
    assert torch.equal(dict(diffusion.text_encoders[0].named_parameters())["final_layer_norm.weight"], stored.float())


def test_published_vae_names_load_to_the_same_weights(sd_folder: Path) -> None:
    stored = load_file(sd_folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert "encoder.mid_block.attentions.0.query.weight" in stored
    vae = load(sd_folder).vae
    query = vae.encoder.mid_block.attentions[0].to_q.weight
    assert torch.equal(query, stored["encoder.mid_block.attentions.0.query.weight"])


def test_parts_work_together_as_a_diffusers_pipeline(sd_folder: Path) -> None:
    parts = load(sd_folder)
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        unet=parts.unet,
        text_encoder=parts.text_encoders[0],
        tokenizer=parts.tokenizers[0],
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a mug", num_inference_steps=2, height=16, width=16).images[0]
    assert image.size == (16, 16)


def test_sdxl_folder_with_fp16_files_gives_two_text_encoders(sdxl_folder: Path) -> None:
    diffusion = load(sdxl_folder, torch.float16, "fp16")
    assert isinstance(diffusion.scheduler, EulerDiscreteScheduler)
    assert [type(text).__name__ for text in diffusion.text_encoders] == ["CLIPTextModel", "CLIPTextModelWithProjection"]
    assert [tokenizer("mug").input_ids for tokenizer in diffusion.tokenizers] == [[58, 53, 59]] * 2
    assert diffusion.unet.dtype == torch.float16
    assert {text.dtype for text in diffusion.text_encoders} == {torch.float16}


def test_vae_that_overflows_in_float16_stays_float32(sdxl_folder: Path, tmp_path: Path) -> None:
    assert load(sdxl_folder, torch.float16, "fp16").vae.dtype == torch.float32
    assert load(sdxl_folder, torch.bfloat16, "fp16").vae.dtype == torch.bfloat16
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "fixed"))
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    assert load(folder, torch.float16, "fp16").vae.dtype == torch.float16


def test_revision_changes_with_the_weights(spoiled: Path) -> None:
    before = load(spoiled)
    assert before.name == "pipeline"
    file = spoiled / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file(state | {"conv_in.bias": state["conv_in.bias"] + 1}, file, metadata={"format": "pt"})
    assert load(spoiled).revision != before.revision


def test_missing_weight_is_named_instead_of_drawn_at_random(spoiled: Path) -> None:
    for folder, file, key in (
        ("text_encoder", "model.safetensors", "final_layer_norm.weight"),
        ("unet", "diffusion_pytorch_model.safetensors", "conv_in.weight"),
    ):
        state = load_file(spoiled / folder / file)
        save_file({k: v for k, v in state.items() if not k.endswith(key)}, spoiled / folder / file, {"format": "pt"})
        with pytest.raises(ModelError, match=f"pipeline/{folder}: 1 missing weights for .*'{key}'"):
            load(spoiled)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("unet/diffusion_pytorch_model.safetensors", b"\x08\0\0\0\0\0\0\0nonsense", "pipeline/unet: cannot be read"),
        ("vae/config.json", b"{", "pipeline/vae: cannot be read"),
        (
            "scheduler/scheduler_config.json",
            b'{"_class_name": "UNet2DModel"}',
            "pipeline/scheduler: 'UNet2DModel' is not",
        ),
        ("scheduler/scheduler_config.json", b'{"_class_name": "Nothing"}', "pipeline/scheduler: cannot be read"),
        ("model_index.json", b'{"_class_name": "FluxPipeline"}', "pipeline: model_index.json names FluxPipeline; only"),
        ("model_index.json", b'{"_class_name": "StableDiffusionPipeline"}', "pipeline: cannot be read as a diffusers"),
        ("text_encoder/model.safetensors", None, "pipeline/text_encoder: cannot be read as CLIPTextModel"),
        ("tokenizer/vocab.json", b"[", "pipeline/tokenizer: cannot be read as a tokenizer"),
        ("tokenizer/merges.txt", None, "pipeline/tokenizer: cannot be read as a tokenizer .*neither tokenizer.json"),
        ("model_index.json", None, "pipeline: cannot be read as a diffusers pipeline folder with model_index.json"),
    ],
)
def test_unreadable_part_is_one_sentence(spoiled: Path, file: str, content: bytes | None, message: str) -> None:
    (spoiled / file).unlink()
    if content is not None:
        (spoiled / file).write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load(spoiled)
    assert "\n" not in str(caught.value)


def test_parts_of_two_models_are_refused(spoiled: Path, sdxl_folder: Path) -> None:
    shutil.rmtree(spoiled / "vae")
    AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=8).save_pretrained(spoiled / "vae")
    with pytest.raises(ModelError, match="reads 4 latent channels, but the VAE produces 8"):
        load(spoiled)
    words = spoiled / "tokenizer" / "vocab.json"
    original = words.read_text()
    words.write_text(json.dumps(json.loads(original) | {f"word{n}": 60 + n for n in range(5)}))
    with pytest.raises(ModelError, match="a tokenizer has 65 tokens, but its text encoder embeds 60"):
        load(spoiled)
    words.write_text(original)
    shutil.rmtree(spoiled / "text_encoder")
    shutil.copytree(sdxl_folder / "text_encoder_2", spoiled / "text_encoder")
    shutil.rmtree(spoiled / "vae")
    shutil.copytree(sdxl_folder / "vae", spoiled / "vae")
    for folder in ("vae", "text_encoder"):
        for file in (spoiled / folder).glob("*.fp16.safetensors"):
            file.rename(str(file).replace(".fp16", ""))
    index = json.loads((spoiled / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModelWithProjection"]
    (spoiled / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="expects width 32, but the text encoders give 48"):
        load(spoiled)


def test_vae_alone_is_the_vae_of_the_whole(sdxl_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sdxl_folder / "vae", tmp_path / "pipeline" / "vae")
    vae = load_vae(DiffusionSpec(path=str(tmp_path / "pipeline"), weights="fp16"), torch.float16, "cpu")
    whole = load(sdxl_folder, torch.float16, "fp16").vae
    assert vae.dtype == whole.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), whole.parameters(), strict=True))
    with pytest.raises(ModelError, match="pipeline/vae: cannot be read"):
        load_vae(DiffusionSpec(path=str(tmp_path / "pipeline")), torch.float32, "cpu")


def test_tokenizers_alone_are_those_of_the_whole_with_the_length_of_a_caption(sdxl_folder: Path) -> None:
    whole = load(sdxl_folder, weights="fp16")
    alone = load_tokenizers(DiffusionSpec(path=str(sdxl_folder), weights="fp16"))
    lengths = [caption_length(*pair) for pair in zip(whole.text_encoders, whole.tokenizers, strict=True)]
    assert [length for _, length in alone] == lengths
    assert [words.get_vocab() for words, _ in alone] == [words.get_vocab() for words in whole.tokenizers]
