"""Sampling of RealCustom and RealCustom++ on tiny models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.hooks import apply_group_offloading
from torch import Tensor

from model.attention import CrossAttentionContext
from model.methods.base import DenoisingState
from model.methods.guidance import RealCustomGuidance
from model.methods.realcustom import sampling
from model.pipeline import CustomContrastPipeline
from model.pipeline.passes import UNetPasses
from model.unet import call_unet
from runtime.errors import ModelError
from tests.world.lora import load_lora
from tests.world.pipelines import controlled, controlnet, draw, edges, pipeline, stock
from tests.world.realcustom import METHODS, BlackClip, adapter_of, build, make_features

PROMPT = "a red mug on a table, a mug"


def guided(**changes: Any) -> RealCustomGuidance:
    return RealCustomGuidance(**changes)


@pytest.fixture
def passes(monkeypatch) -> list[tuple[CrossAttentionContext, Tensor, Tensor]]:
    """Context, input and prediction of every UNet pass."""
    found = []
    call = UNetPasses.__call__

    def spied(self, latents, t, context, text):
        out = call(self, latents, t, context, text)
        found.append((context, latents, out))
        return out

    monkeypatch.setattr(UNetPasses, "__call__", spied)
    return found


def with_masks(monkeypatch, value: float) -> None:
    """Masks of one value everywhere, in place of those of the maps."""

    def constant(recorder, tokens, size, guidance):
        return torch.full((*tokens.shape, 2, 2), value)

    monkeypatch.setattr(sampling, "subject_mask", constant)


def locations(built: CustomContrastPipeline, *args: Any, **settings: Any) -> list[Tensor]:
    """The masks of each step."""
    found: list[Tensor] = []

    def keep(_: Any, step: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        found.append(tensors["location"])
        return {}

    draw(built, *args, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["location"], **settings)
    return found


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("method", METHODS)
def test_without_reference_it_is_the_stock_pipeline_bit_for_bit(request, kind, method):
    diffusion = request.getfixturevalue(kind)
    built = build(diffusion, method)
    expected = draw(stock(diffusion, built), PROMPT)
    assert torch.equal(draw(built, PROMPT, guidance=guided(image_scale=40.0)), expected)
    zero = draw(built, PROMPT, make_features(1), "mug", subject_strength=0, guidance=guided(image_scale=40.0))
    assert torch.equal(zero, expected)
    assert not torch.equal(draw(built, PROMPT, make_features(1), "mug"), expected)


@pytest.mark.parametrize(
    ("method", "changes", "rows"),
    [
        ("realcustom", {}, 3 * 25),
        ("realcustom_pp", {}, 2 * 25 + 12),
        ("realcustom_pp", {"mask_steps": 1.0}, 3 * 25),
        ("realcustom_pp", {"guidance": "cascade"}, 3 * 25),
        ("realcustom", {"guidance": "direct", "mask_steps": 0.01}, 2 * 25 + 1),
    ],
)
def test_unet_sees_as_many_rows_as_the_paper_s(tiny_sd, passes, method, changes, rows):
    draw(build(tiny_sd, method), PROMPT, make_features(1), "mug", num_inference_steps=25, guidance=guided(**changes))
    assert sum(len(latents) for _, latents, _ in passes) == rows


def test_without_masks_or_guidance_only_the_image_pass_is_left(tiny_sd, passes):
    built = build(tiny_sd, "realcustom_pp")
    draw(built, PROMPT, make_features(1), "mug", location_masks=False, guidance_scale=1.0)
    assert [len(latents) for _, latents, _ in passes] == [1, 1, 1]
    assert all(context.location is None for context, _, _ in passes)


@pytest.mark.parametrize("method", METHODS)
def test_mask_of_the_first_step_does_not_depend_on_the_reference_and_acts_in_it(tiny_sd, method, passes):
    built = build(tiny_sd, method)
    whole = guided(mask_steps=1.0)
    one, other = (locations(built, PROMPT, make_features(1, seed), "mug", guidance=whole) for seed in (2, 3))
    assert torch.equal(one[0], other[0]) and not torch.equal(one[2], other[2])
    assert one[0].shape == (1, 1, 8, 8) and (one[0] > 0).sum() == 16 and one[0].max() == 1
    text, image = passes[0][0], passes[1][0]
    assert text.keys is None and text.location is None and torch.equal(passes[0][1], passes[1][1][:1])
    assert image.placeholder is None and torch.equal(image.location[-1:], one[0])


def test_last_mask_stays_after_its_share_of_the_steps(tiny_sd):
    built = build(tiny_sd, "realcustom_pp")
    found = locations(built, PROMPT, make_features(1), "mug", num_inference_steps=4, guidance=guided(mask_steps=0.5))
    assert not torch.equal(found[0], found[1])
    assert all(one is found[1] for one in found[2:])


@pytest.mark.parametrize("method", METHODS)
def test_mask_of_zeros_leaves_the_prompt_alone_and_of_ones_the_unmasked_branch(tiny_sd, method, monkeypatch):
    built, plain = build(tiny_sd, method), guided(negative="none", text_mask=False, key_ratio=1.0)
    expected = draw(built, PROMPT)
    unmasked = draw(built, PROMPT, make_features(1), "mug", location_masks=False, guidance=plain)
    with_masks(monkeypatch, 0.0)
    torch.testing.assert_close(
        draw(built, PROMPT, make_features(1), "mug", guidance=plain), expected, rtol=1e-4, atol=1e-5
    )
    with_masks(monkeypatch, 1.0)
    found = draw(built, PROMPT, make_features(1), "mug", guidance=plain)
    torch.testing.assert_close(found, unmasked, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_equal_scales_make_the_cascade_direct(tiny_sd, method):
    built = build(tiny_sd, method)
    cascade, direct, other = (
        draw(built, PROMPT, make_features(1), "mug", guidance=guided(guidance=how, image_scale=scale))
        for how, scale in (("cascade", 5.0), ("direct", 2.0), ("cascade", 2.0))
    )
    torch.testing.assert_close(cascade, direct, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(cascade, other, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_negative_side_is_the_stock_one_or_a_black_image_under_the_same_mask(tiny_sd, method, passes):
    built = build(tiny_sd, method)
    first = {}
    for negative in ("none", "black"):
        passes.clear()
        draw(built, PROMPT, make_features(1), "mug", guidance=guided(negative=negative), num_inference_steps=1)
        context, latents, out = passes[1]
        first[negative] = out[0]
        rows = 2 if negative == "black" else 1
        assert context.bare == 2 - rows and len(context.keys[0]) == rows and len(context.location) == rows
        assert torch.equal(context.location[0], context.location[-1])
    text = CrossAttentionContext(context.text, (8, 8))
    stock_out = call_unet(tiny_sd.unet, latents, built.scheduler.timesteps[0], text, None)
    torch.testing.assert_close(first["none"], stock_out[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first["black"], first["none"], atol=1e-3)


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_pictures_alone(request, kind, method):
    built = build(request.getfixturevalue(kind), method)
    prompts, noise = ["a mug", PROMPT], torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    both = draw(built, prompts, make_features(1), "mug", latents=noise)
    for row, prompt in enumerate(prompts):
        alone = draw(built, prompt, make_features(1), "mug", latents=noise[row : row + 1])
        torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_order_of_subjects_does_not_matter_and_each_has_its_mask(tiny_sd, method):
    built, features = build(tiny_sd, method), make_features(2)
    one = draw(built, "a mug and a can", features, ("mug", "can"))
    other = draw(built, "a mug and a can", features.flip(0), ("can", "mug"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one, draw(built, "a mug and a can", features, ("can", "mug")), atol=1e-3)
    found = locations(built, "a mug and a can", features, ("mug", "can"))[0]
    assert found.shape == (1, 2, 8, 8) and not torch.equal(found[:, 0], found[:, 1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masks", [True, False])
def test_photos_of_one_subject_count_as_their_mean(tiny_sd, method, masks):
    built = build(tiny_sd, method)
    built.hidden_states = lambda references, subjects: (make_features(1).repeat(3, 1, 1, 1), [3])
    several = draw(built, PROMPT, make_features(1), "mug", location_masks=masks)
    del built.hidden_states
    torch.testing.assert_close(several, draw(built, PROMPT, make_features(1), "mug", location_masks=masks))


@pytest.mark.parametrize("method", METHODS)
def test_target_phrase_chooses_where_the_subject_acts(tiny_sd, method):
    built = build(tiny_sd, method)
    args = (PROMPT, make_features(1), "mug")
    noun, same, other = (locations(built, *args, guidance=guided(words=w))[0] for w in (None, "mug", "table"))
    assert torch.equal(noun, same) and not torch.equal(noun, other)
    # The noun names the subject alone: a prompt without it is fine.
    draw(built, "a red toy", make_features(1), "mug", guidance=guided(words="toy"))


def test_scores_read_the_phrase_s_text_and_the_latents_inside_the_mask(tiny_sd, monkeypatch):
    built, seen = build(tiny_sd, "realcustom"), []
    built.scheduler = EulerDiscreteScheduler.from_config(built.scheduler.config)
    encoder = built.adapter.mfi.forward

    def spied(features: Tensor, timesteps: Tensor, state: DenoisingState) -> Any:
        seen.append(state)
        return encoder(features, timesteps, state)

    monkeypatch.setattr(built.adapter.mfi, "forward", spied)
    found = locations(built, PROMPT, make_features(1), "mug")
    draw(built, PROMPT, make_features(1), "mug", guidance=guided(text_mask=False), location_masks=False)
    masked, whole = seen[0], seen[3]
    places = masked.text[0].abs().sum(dim=-1).nonzero()[:, 0].tolist()
    ids = tiny_sd.tokenizers[0](PROMPT).input_ids
    mug = tiny_sd.tokenizers[0]("mug", add_special_tokens=False).input_ids
    assert [ids[place] for place in places] == mug * 2 and whole.text.abs().sum(dim=-1).all()
    torch.testing.assert_close(masked.latents, whole.latents * found[0])
    assert whole.latents.std() == pytest.approx(1, abs=0.15)  # Euler's own latents are 14 times as large
    schedule, t = built.scheduler.alphas_cumprod, built.scheduler.timesteps
    assert [float(one.alphas) for one in seen[:3]] == [float(schedule[round(float(step))]) for step in t]
    assert masked.key_ratio == 0.8


@pytest.mark.parametrize("method", METHODS)
def test_self_attention_can_carry_the_mask(tiny_sd, method):
    found = locations(build(tiny_sd, method), PROMPT, make_features(1), "mug", guidance=guided(self_attention=True))
    assert found[0].shape == (1, 1, 4, 4) and (found[0] > 0).sum() == 4


@pytest.mark.parametrize(
    ("method", "args", "settings", "said"),
    [
        ("mfi", ("a mug",), {"guidance": guided()}, "method 'mfi' takes no guidance; leave it out"),
        ("realcustom", ("a mug",), {"guidance": 7.5}, "guidance is a float; give a RealCustomGuidance"),
        ("realcustom", ("a mug", 1, "mug"), {"guidance": guided(words=("a", "mug"))}, "2 target phrases for 1 subj"),
        ("realcustom", ("a can", 1, "mug"), {}, "'a can' has no target phrase 'mug'"),
        ("realcustom_pp", (None, 1, "mug"), {"prompt_embeds": torch.zeros(1, 24, 20)}, "'mug' is looked up in the"),
    ],
)
def test_call_that_does_not_fit_is_one_sentence(tiny_sd, method, args, settings, said):
    built = pipeline(tiny_sd) if method == "mfi" else build(tiny_sd, method)
    prompt, *rest = args
    with pytest.raises(ModelError, match=said):
        draw(built, prompt, *(make_features(1) if part == 1 else part for part in rest), **settings)


@pytest.mark.parametrize(
    "changes",
    [{"scope": 0.0}, {"key_ratio": 1.5}, {"mask_steps": -1}, {"guidance": "both"}, {"image_scale": float("nan")}],
)
def test_guidance_out_of_range_is_one_sentence(changes):
    with pytest.raises(ModelError, match=f"guidance: {next(iter(changes))} is"):
        guided(**changes)


def test_black_image_that_nobody_can_read_is_one_sentence(tiny_sd):
    built = build(tiny_sd, "realcustom_pp")
    built.register_modules(image_encoder=None)
    with pytest.raises(ModelError, match="the pipeline has no image encoder"):
        draw(built, PROMPT, make_features(1), "mug")
    built.black = make_features(1, seed=9)
    draw(built, PROMPT, make_features(1), "mug")


def test_scheduler_without_a_noise_schedule_is_one_sentence(tiny_sd):
    built = build(tiny_sd, "realcustom")
    passes = UNetPasses(built, SimpleNamespace(guidance_scale=5.0, features=None), None, None)
    passes.scheduler = SimpleNamespace()
    with pytest.raises(ModelError, match="SimpleNamespace has no alphas_cumprod"):
        passes.alpha(torch.tensor(3))


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("guess", [False, True])
def test_controlnet_acts_in_both_passes(request, kind, guess, monkeypatch):
    diffusion = request.getfixturevalue(kind)
    ours, loaded = controlled(diffusion, controlnet(diffusion))
    expected = draw(loaded, PROMPT, image=edges(1), guess_mode=guess)
    built = type(ours).from_pipe(loaded, adapter_of(diffusion, "realcustom"))
    built.set_progress_bar_config(disable=True)
    shown = draw(built, PROMPT, make_features(1), "mug", control_image=edges(1), guess_mode=guess)
    with_masks(monkeypatch, 0.0)
    found = draw(built, PROMPT, make_features(1), "mug", control_image=edges(1), guess_mode=guess)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(shown, expected, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_guidance_can_be_turned_off_between_steps(tiny_sd, method, passes):
    built = build(tiny_sd, method)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    draw(built, PROMPT, make_features(1), "mug", callback_on_step_end=cutoff)
    rows = [len(latents) for _, latents, _ in passes]
    assert rows == ([1, 2, 1, 1, 1, 1] if method == "realcustom" else [1, 2, 1, 1])


@pytest.mark.parametrize("method", METHODS)
def test_saved_pipeline_draws_what_it_drew(tiny_sd, method, tmp_path):
    built = build(tiny_sd, method)
    expected = draw(built, PROMPT, make_features(1), "mug")
    built.save_pretrained(tmp_path)
    loaded = type(built).from_pretrained(tmp_path, image_encoder=BlackClip())
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(loaded, PROMPT, make_features(1), "mug"), expected)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_makes_an_image(tiny_sd, method):
    built = build(tiny_sd, method)
    built.to(torch.bfloat16)
    assert torch.isfinite(draw(built, PROMPT, make_features(1), "mug")).all()


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("method", METHODS)
def test_lora_acts_in_every_pass(request, kind, method, tmp_path):
    diffusion = request.getfixturevalue(kind)
    built = build(diffusion, method)
    plain = draw(built, PROMPT, make_features(1), "mug")
    load_lora(built, diffusion, tmp_path, "style")
    shown = draw(built, PROMPT, make_features(1), "mug")
    assert not torch.allclose(shown, plain, atol=1e-3)
    zero = draw(built, PROMPT, make_features(1), "mug", subject_strength=0)
    assert torch.equal(zero, draw(stock(diffusion, built), PROMPT))
    scale = {"cross_attention_kwargs": {"scale": 0.0}}
    torch.testing.assert_close(draw(built, PROMPT, make_features(1), "mug", **scale), plain, rtol=1e-4, atol=1e-5)
    built.unload_lora_weights()
    assert torch.equal(draw(built, PROMPT, make_features(1), "mug"), plain)


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("method", METHODS)
def test_offloaded_weights_give_the_same_image(request, kind, method):
    """As `enable_model_cpu_offload` and `enable_group_offload` do it; here both devices are the same."""
    diffusion = request.getfixturevalue(kind)
    built = build(diffusion, method)
    whole = draw(built, PROMPT, make_features(1), "mug")
    built.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(built, PROMPT, make_features(1), "mug"), whole)
    built.remove_all_hooks()
    for module in (*diffusion.text_encoders, diffusion.unet, diffusion.vae):
        cpu = torch.device("cpu")
        apply_group_offloading(module, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(draw(built, PROMPT, make_features(1), "mug"), whole)
