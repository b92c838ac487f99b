from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from model.adapter import Adapter
from model.backbones.diffusion import Diffusion, load_diffusion
from model.backbones.variant import load_variant
from model.objective import TrainingBatch
from model.pipeline.pipeline import build_pipeline
from runtime.errors import ModelError, UserError
from tests.world.training import CHANNELS, LAYERS, SIDE, TOKENS, WIDTH
from train.logs.sheets import GAP, Samples
from train.recipe import PicturesParams

PARAMS = PicturesParams(every=1, subjects=2, prompts=["a {class} on a beach"], steps=2, guidance_scale=3.0, seed=5)


@pytest.fixture(scope="module")
def diffusion(variant: Path) -> Diffusion:
    return load_diffusion(load_variant(str(variant)).diffusion, torch.float32, "cpu")


@pytest.fixture(scope="module")
def adapter(diffusion: Diffusion) -> Adapter:
    torch.manual_seed(0)
    return Adapter.for_unet(
        diffusion.unet,
        base_model=diffusion.name,
        base_revision=diffusion.revision,
        image_encoder="tiny",
        feature_layers=(1, 3),
        feature_width=WIDTH,
        text_widths=[text.config.hidden_size for text in diffusion.text_encoders],
        width=16,
        heads=2,
        depth=1,
        visual_tokens=3,
        fourier_pairs=8,
    )


def batch(rows: int = 3) -> TrainingBatch:
    generator = torch.Generator().manual_seed(0)
    part: Any = SimpleNamespace(
        captions=[f"a photo of a {noun}" for noun in ("mug", "dog", "can")][:rows],
        class_nouns=["mug", "dog", "can"][:rows],
        reference=torch.randn(rows, LAYERS, TOKENS, WIDTH, generator=generator),
        latents=torch.randn(rows, CHANNELS, SIDE, SIDE, generator=generator),
        black=None,
    )
    return cast(TrainingBatch, part)


def sheets(diffusion: Diffusion, adapter: Adapter, folder: Path, **changes: Any) -> Samples:
    return Samples.of(PARAMS.model_copy(update=changes), diffusion, adapter, batch(), folder)


def test_sheet_shows_target_own_caption_and_prompts_of_each_subject(
    diffusion: Diffusion, adapter: Adapter, tmp_path: Path
):
    drawn = sheets(diffusion, adapter, tmp_path)
    assert drawn.draw(adapter.state_dict(), 40) == "samples/step-000040.png"
    (file,) = (tmp_path / "samples").iterdir()
    with Image.open(file) as sheet:
        pixels = np.asarray(sheet)
        settings = json.loads(sheet.text["customcontrast"])
        assert sheet.text["generated"] == "yes" and sheet.text["model"] == adapter.config.base_model
    assert pixels.shape == (2 * SIDE + GAP, 3 * SIDE + 2 * GAP, 3)
    assert settings["prompts"] == [[f"a photo of a {noun}", f"a {noun} on a beach"] for noun in ("mug", "dog")]
    pipeline = build_pipeline(diffusion, adapter)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        "a dog on a beach",
        batch().reference[1:2],
        "dog",
        height=SIDE,
        width=SIDE,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    found = pixels[SIDE + GAP :, 2 * (SIDE + GAP) :]
    # A batch of two prompts rounds otherwise than one.
    assert np.abs(found.astype(int) - np.asarray(wanted).astype(int)).max() <= 1
    target = pipeline.decode(batch().latents[1:2], "pil")[0]
    np.testing.assert_array_equal(pixels[SIDE + GAP :, :SIDE], np.asarray(target))


def test_drawing_leaves_random_numbers_and_weights_alone_and_follows_the_weights(
    diffusion: Diffusion, adapter: Adapter, tmp_path: Path
):
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    state = torch.random.get_rng_state()
    drawn = sheets(diffusion, adapter, tmp_path)
    drawn.draw(before, 1)
    drawn.draw({name: tensor + 0.3 for name, tensor in before.items()}, 2)
    drawn.draw(before, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())
    first, second, third = (
        np.asarray(Image.open(tmp_path / "samples" / f"step-00000{step}.png")) for step in (1, 2, 3)
    )
    np.testing.assert_array_equal(first, third)
    assert not np.array_equal(first, second)


def test_more_steps_than_the_process_has_are_refused_before_training(
    diffusion: Diffusion, adapter: Adapter, tmp_path: Path
):
    with pytest.raises(UserError, match=r"train\.pictures\.steps is 1001, .* 1000 timesteps; give at most that many"):
        sheets(diffusion, adapter, tmp_path, steps=1001)


def test_prompt_without_its_noun_is_refused_before_training(diffusion: Diffusion, adapter: Adapter, tmp_path: Path):
    with pytest.raises(ModelError, match="'a beach' has no class noun 'mug'"):
        sheets(diffusion, adapter, tmp_path, prompts=["a beach"])
