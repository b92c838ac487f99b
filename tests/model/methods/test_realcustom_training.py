"""Training of RealCustom and RealCustom++ on tiny models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.methods.base import DenoisingState
from model.objective import ObjectiveConfig, TrainingBatch
from runtime.errors import ModelError
from tests.world.models import FEATURE_TOKENS, FEATURE_WIDTH, TinyDiffusion
from tests.world.realcustom import METHODS, adapter_of, make_features

ALONE = ObjectiveConfig(cscl=False, macl=False, location_weight=0)


def make_batch(rows: int = 3) -> TrainingBatch:
    generator = torch.Generator().manual_seed(5)
    return TrainingBatch(
        latents=torch.randn(rows, 4, 8, 8, generator=generator),
        subject_masks=torch.ones(rows, 8, 8),
        captions=["a mug on ice", "a red mug", "the mug"][:rows],
        class_nouns=["mug"] * rows,
        reference=make_features(rows),
        positive=make_features(rows, seed=3),
        similarity=torch.zeros(rows, rows),
        subjects=torch.arange(rows),
        timesteps=torch.tensor([10, 500, 900])[:rows],
        noise=torch.randn(rows, 4, 8, 8, generator=generator),
        drop_image=torch.zeros(rows, dtype=torch.bool),
        drop_text=torch.zeros(rows, dtype=torch.bool),
        key_ratio=0.5,
        black=make_features(1, seed=9),
    )


def losses(diffusion: TinyDiffusion, adapter: Any, batch: TrainingBatch, config: ObjectiveConfig = ALONE) -> Any:
    from model.methods.registry import method_of

    return method_of(adapter.config).losses(batch, adapter, adapter.config, diffusion, config)


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_reaches_every_trained_parameter_and_no_frozen_one(request, kind, method):
    diffusion = request.getfixturevalue(kind)
    adapter = adapter_of(diffusion, method)
    parts = losses(diffusion, adapter, make_batch())
    assert parts["total"] == parts["diffusion"] and parts["sample_diffusion"].shape == (3,)
    assert parts["cscl"] == parts["macl"] == parts["location"] == 0
    parts["total"].backward()
    # A bias in front of a softmax over features shifts all scores alike.
    without = {name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12}
    assert all(name.endswith("mlp.2.bias") for name in without)
    assert all(p.grad is None for module in (diffusion.unet, *diffusion.text_encoders) for p in module.parameters())


def test_training_reads_caption_noisy_latents_and_the_share_of_the_step(tiny_sd, monkeypatch):
    adapter, seen, batch = adapter_of(tiny_sd, "realcustom"), [], make_batch()
    batch.drop_text[1] = True
    encoder = adapter.mfi.forward
    monkeypatch.setattr(adapter.mfi, "forward", lambda f, t, state: seen.append(state) or encoder(f, t, state))
    losses(tiny_sd, adapter, batch)
    (state,) = seen
    schedule = tiny_sd.scheduler.alphas_cumprod[batch.timesteps]
    torch.testing.assert_close(state.alphas, schedule)
    noisy = schedule.sqrt()[:, None, None, None] * batch.latents
    torch.testing.assert_close(state.latents, noisy + (1 - schedule).sqrt()[:, None, None, None] * batch.noise)
    empty = tiny_sd.tokenizers[0]("", padding="max_length", max_length=24, return_tensors="pt").input_ids
    torch.testing.assert_close(state.text[1:2], tiny_sd.text_encoders[0](empty).last_hidden_state)
    assert state.key_ratio == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_dropped_image_is_the_branch_left_out_or_a_black_image(tiny_sd, method):
    adapter, batch = adapter_of(tiny_sd, method), make_batch()
    batch.drop_image[1] = True
    dropped = losses(tiny_sd, adapter, batch)["sample_diffusion"]
    changed = replace(batch, reference=torch.cat([batch.reference[:1], batch.reference[1:] + 1]))
    others = losses(tiny_sd, adapter, changed)["sample_diffusion"]
    assert dropped[0] == others[0] and dropped[1] == others[1] and dropped[2] != others[2]
    blacker = losses(tiny_sd, adapter, replace(batch, black=batch.black + 1))["sample_diffusion"]
    assert (dropped[1] == blacker[1]) == (method == "realcustom") and dropped[0] == blacker[0]


def test_dropped_image_without_a_black_one_is_one_sentence(tiny_sd):
    batch = replace(make_batch(), black=None)
    losses(tiny_sd, adapter_of(tiny_sd, "realcustom_pp"), batch)
    batch.drop_image[1] = True
    with pytest.raises(ModelError, match="the batch has no features of a black image"):
        losses(tiny_sd, adapter_of(tiny_sd, "realcustom_pp"), batch)


@pytest.mark.parametrize("change", [{"cscl": True}, {"macl": True}, {"location_weight": 0.1}])
@pytest.mark.parametrize("method", METHODS)
def test_loss_that_the_method_lacks_is_one_sentence(tiny_sd, method, change):
    with pytest.raises(ModelError, match=f"{method} has neither contrastive losses nor a location loss"):
        losses(tiny_sd, adapter_of(tiny_sd, method), make_batch(), replace(ALONE, **change))


def test_tokens_of_realcustom_have_the_width_of_its_features(tiny_sd):
    adapter = adapter_of(tiny_sd, "realcustom")
    assert adapter.config.visual_width == FEATURE_WIDTH and adapter.config.latent_channels == 4
    state = DenoisingState(torch.randn(2, 24, 20), torch.randn(2, 4, 8, 8), torch.rand(2), 0.5)
    out = adapter(make_features(2), torch.zeros(2), state=state)
    assert out.mfi.visual_tokens.shape == (2, (FEATURE_TOKENS - 1) // 2, FEATURE_WIDTH)
    with pytest.raises(ModelError, match="realcustom's tokens are image features, of width 24, but visual_width is 20"):
        adapter_of(tiny_sd, "realcustom", visual_width=20)


@pytest.mark.parametrize("method", METHODS)
def test_saved_adapter_is_loaded_as_it_was(tiny_sd, tmp_path, method):
    sizes = {"scoring": {"width": 7, "gain": 4.0, "fusion": "mean"}, "projector": {"head": 12}}
    adapter = adapter_of(tiny_sd, method, **sizes)
    adapter.save(tmp_path)
    loaded = type(adapter).load(tmp_path)
    assert loaded.config == adapter.config and loaded.config.scoring.width == 7
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), loaded.parameters(), strict=True))
