"""Texts, embeddings, sizes, timesteps and LoRA scale of a call, beside diffusers' own pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from transformers import CLIPTextModel

from model.pipeline import CustomContrastPipeline
from runtime.errors import ModelError
from tests.world.models import TinyDiffusion, make_features, tokenizer
from tests.world.pipelines import draw, pipeline, stock

PROMPTS = ["a mug on ice", "a photo of a mug"]


@pytest.fixture(autouse=True)
def inner_text_model(monkeypatch):
    """Diffusers' `clip_skip` reads `text_encoder.text_model`, which CLIPTextModel no longer has in transformers 5."""
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)


def plain(ours: CustomContrastPipeline, prompt: Any, **settings: Any) -> torch.Tensor:
    """An image with a subject of strength 0."""
    return draw(ours, prompt, make_features(1), "mug", subject_strength=0.0, **settings)


def constant_word(ours: CustomContrastPipeline, diffusion: TinyDiffusion) -> None:
    """Make every pseudo-word the vector of the word "red", and the visual branch zero."""
    for head, encoder in zip(ours.adapter.mfi.textual.heads, diffusion.text_encoders, strict=True):
        red = tokenizer()("red", add_special_tokens=False).input_ids
        head.weight.data.zero_()
        head.bias.data = encoder.get_input_embeddings().weight.data[red[0]].clone()
    for projection in ours.adapter.projections:
        projection.to_v.weight.data.zero_()


@pytest.mark.parametrize("skipped", [0, 1])
def test_clip_skip_is_that_of_the_stock_pipeline(diffusion, skipped):
    ours = pipeline(diffusion)
    settings = {"clip_skip": skipped, "negative_prompt": "blurred"}
    found = plain(ours, "a mug on ice", **settings)
    assert ours.clip_skip == skipped
    assert torch.equal(found, draw(stock(diffusion, ours), "a mug on ice", **settings))
    assert torch.equal(found, draw(ours, "a mug on ice", negative_prompt="blurred")) == (skipped == 0)


def test_pseudo_words_skip_the_same_layers(diffusion):
    ours = pipeline(diffusion, rescale=False)
    constant_word(ours, diffusion)
    found = draw(ours, "a mug on ice", make_features(1), "mug", location_masks=False, clip_skip=1)
    expected = draw(stock(diffusion, ours), "a mug red on ice", clip_skip=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    other = draw(ours, "a mug on ice", make_features(1), "mug", location_masks=False)
    assert (found - other).abs().max() > 1e-3


def test_embeddings_of_diffusers_give_its_image(diffusion):
    ours = pipeline(diffusion)
    built = stock(diffusion, ours)
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    settings: dict[str, Any] = {"num_images_per_prompt": 2}
    for negative in (None, ["blurred", "grey"]):
        given = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        made = ours.encode_prompt(prompt=PROMPTS, negative_prompt=negative, **given)
        for found, theirs in zip(
            made, built.encode_prompt(prompt=PROMPTS, negative_prompt=negative, **given), strict=True
        ):
            assert torch.equal(found, theirs)
        embeds = dict(zip(names, made, strict=False))
        found = draw(ours, None, **embeds, **settings)
        assert torch.equal(found, draw(built, None, **embeds, **settings))
        assert torch.equal(found, draw(ours, PROMPTS, negative_prompt=negative, **settings))
        assert torch.equal(found, plain(ours, None, **embeds, **settings))
        words = {name: value for name, value in embeds.items() if not name.startswith("negative")}
        found = draw(ours, None, **words, negative_prompt=["blurred", "grey"], **settings)
        assert torch.equal(found, draw(ours, PROMPTS, negative_prompt=["blurred", "grey"], **settings))


def test_embeddings_may_be_longer_than_a_caption(diffusion):
    """As prompt-weighting libraries make them from several captions."""
    ours, width = pipeline(diffusion), diffusion.unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(3)
    long = [torch.randn(1, 40, width, generator=generator) for _ in range(2)]
    embeds = dict(zip(["prompt_embeds", "negative_prompt_embeds"], long, strict=True))
    if len(diffusion.text_encoders) > 1:
        embeds |= {f"{side}pooled_prompt_embeds": torch.randn(1, 12, generator=generator) for side in ("", "negative_")}
    assert torch.equal(draw(ours, None, **embeds), draw(stock(diffusion, ours), None, **embeds))
    del embeds["negative_prompt_embeds"]
    embeds.pop("negative_pooled_prompt_embeds", None)
    with pytest.raises(ModelError, match="prompt_embeds have 40 tokens, but a negative prompt has 24; give negative"):
        draw(ours, None, **embeds, negative_prompt="blurred")


def test_negative_embeddings_go_with_a_subject(diffusion):
    ours = pipeline(diffusion)
    given = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    _, negative, *pooled = ours.encode_prompt(prompt=PROMPTS, negative_prompt=["blurred", "grey"], **given)
    embeds = {"negative_prompt_embeds": negative} | ({"negative_pooled_prompt_embeds": pooled[1]} if pooled else {})
    found = draw(ours, PROMPTS, make_features(1), "mug", **embeds)
    assert torch.equal(found, draw(ours, PROMPTS, make_features(1), "mug", negative_prompt=["blurred", "grey"]))


def test_embeddings_go_with_an_adapter_without_pseudo_words(tiny_sd):
    ours = pipeline(tiny_sd, textual=False, tv_fusion=False)
    given = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    embeds, _ = ours.encode_prompt(prompt="a mug", **given)
    found = draw(ours, None, make_features(1), "mug", prompt_embeds=embeds)
    assert torch.equal(found, draw(ours, "a mug", make_features(1), "mug"))


@pytest.mark.parametrize(
    "second",
    [
        {"prompt_2": "in oil"},
        {"prompt_2": ["in oil", "in ink"]},
        {"prompt_2": ""},
        {"negative_prompt": "blurred", "negative_prompt_2": ["grey", "dark"]},
        {"negative_prompt": "", "negative_prompt_2": "grey", "prompt_2": "in oil"},
    ],
    ids=str,
)
def test_second_prompts_are_read_by_the_second_text_encoder(tiny_sdxl, second):
    ours = pipeline(tiny_sdxl)
    each = {name: [text] * 2 if isinstance(text, str) and text else text for name, text in second.items()}
    each |= {"negative_prompt": [second["negative_prompt"]] * 2} if "negative_prompt" in second else {}
    found = plain(ours, PROMPTS, num_images_per_prompt=2, **second)
    assert torch.equal(found, draw(stock(tiny_sdxl, ours), PROMPTS, num_images_per_prompt=2, **each))


def test_pseudo_word_is_in_both_prompts(tiny_sdxl):
    ours = pipeline(tiny_sdxl, rescale=False)
    constant_word(ours, tiny_sdxl)
    found = draw(ours, "a mug on ice", make_features(1), "mug", prompt_2="a mug in oil", location_masks=False)
    expected = draw(stock(tiny_sdxl, ours), "a mug red on ice", prompt_2="a mug red in oil")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="caption 'in oil' has no class noun 'mug'"):
        draw(ours, "a mug on ice", make_features(1), "mug", prompt_2="in oil")
    with pytest.raises(ModelError, match="prompt and prompt_2 have the class noun at different tokens"):
        draw(ours, "a mug on ice", make_features(1), "mug", prompt_2="oil of a mug")


def test_guidance_rescale_is_that_of_the_stock_pipeline(diffusion):
    ours = pipeline(diffusion)
    found = plain(ours, PROMPTS, guidance_rescale=0.7)
    assert torch.equal(found, draw(stock(diffusion, ours), PROMPTS, guidance_rescale=0.7))
    shown = [draw(ours, "a mug", make_features(1), "mug", guidance_rescale=value) for value in (0.0, 0.7)]
    assert not torch.equal(*shown) and ours.guidance_rescale == 0.7


@pytest.mark.parametrize(
    "sizes",
    [
        {"original_size": (64, 48)},
        {"crops_coords_top_left": (3, 5), "target_size": (32, 32)},
        {"negative_original_size": (8, 8), "negative_target_size": (24, 16), "negative_crops_coords_top_left": (1, 2)},
        {"negative_original_size": (8, 8)},
    ],
    ids=str,
)
def test_sizes_are_those_of_the_stock_pipeline(tiny_sdxl, sizes):
    ours = pipeline(tiny_sdxl)
    found = plain(ours, "a mug", **sizes)
    assert torch.equal(found, draw(stock(tiny_sdxl, ours), "a mug", **sizes))
    assert torch.equal(found, draw(ours, "a mug")) == (sizes.keys() == {"negative_original_size"})
    shown = [draw(ours, "a mug", make_features(1), "mug", **given) for given in ({}, sizes)]
    assert torch.equal(*shown) == (sizes.keys() == {"negative_original_size"})


def test_negative_sizes_are_those_of_the_unconditional_rows_of_every_image(tiny_sdxl):
    ours = pipeline(tiny_sdxl)
    sizes = {"negative_original_size": (8, 8), "negative_target_size": (24, 16)}
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    found = draw(ours, PROMPTS, latents=latents, **sizes)
    for place, prompt in enumerate(PROMPTS):
        alone = draw(stock(tiny_sdxl, ours), prompt, latents=latents[place : place + 1], **sizes)
        torch.testing.assert_close(found[place], alone[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("EulerDiscrete", {"timesteps": [900, 500, 100]}),
        ("EulerDiscrete", {"sigmas": [10.0, 3.0, 0.5]}),
        ("DPMSolverMultistep", {"timesteps": [999, 845, 730, 20]}),
        ("LCM", {"timesteps": [899, 459]}),
        ("HeunDiscrete", {"timesteps": [900, 500, 100]}),
    ],
)
def test_given_timesteps_are_those_of_the_stock_pipeline(diffusion, name, schedule):
    ours = pipeline(diffusion)
    built = stock(diffusion, ours)
    for one in (ours, built):
        one.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(diffusion.scheduler.config)
    found = plain(ours, "a mug on ice", **schedule)
    assert ours.num_timesteps == len(ours.scheduler.timesteps)
    assert torch.equal(found, draw(built, "a mug on ice", **schedule))
    asked = []
    encode = ours.adapter.mfi.at_timesteps
    ours.adapter.mfi.at_timesteps = lambda *given: asked.append(given[1]) or encode(*given)
    shown = draw(ours, "a mug on ice", make_features(1), "mug", **schedule)
    assert torch.isfinite(shown).all() and not torch.equal(shown, found)
    assert torch.equal(asked[0], ours.scheduler.timesteps)


def test_equal_timesteps_are_steps_of_their_own_as_in_sdxl_s_stock_pipeline(diffusion):
    ours = pipeline(diffusion)
    ours.scheduler = diffusers.EulerDiscreteScheduler.from_config(diffusion.scheduler.config)
    found = plain(ours, "a mug", timesteps=[900, 900, 100])
    assert torch.isfinite(found).all()
    if len(diffusion.text_encoders) > 1:  # Stable Diffusion's runs out of steps
        assert torch.equal(found, draw(stock(diffusion, ours), "a mug", timesteps=[900, 900, 100]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": None}, "no prompt was given; give one or several, or prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 24, 20)}, "prompt and prompt_embeds were both given; give one"),
        ({"negative_prompt": "x", "negative_prompt_embeds": torch.zeros(1, 24, 20)}, "were both given; give one of"),
        (
            {"negative_prompt_embeds": torch.zeros(1, 23, 20)},
            r"of shape \(1, 23, 20\); give a tensor of shape \(1, 24, 20\)",
        ),
        ({"negative_prompt_embeds": torch.zeros(2, 24, 20)}, r"give a tensor of shape \(1, 24, 20\)"),
        ({"negative_prompt_embeds": torch.full((1, 24, 20), torch.nan)}, "negative_prompt_embeds contains NaN"),
        ({"prompt": None, "prompt_embeds": torch.zeros(24, 20)}, r"give a tensor of shape \(any, any, 20\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(0, 24, 20)}, r"give a tensor of shape \(any, any, 20\)"),
        ({"prompt": None, "prompt_embeds": "a mug"}, "prompt_embeds is the text 'a mug'; give a tensor"),
        ({"prompt_2": "a mug"}, "prompt_2 is an argument of SDXL, but the base model is none; leave it out"),
        ({"pooled_prompt_embeds": torch.zeros(1, 12)}, "pooled_prompt_embeds is an argument of SDXL"),
        ({"original_size": (64, 64)}, "original_size is an argument of SDXL"),
        ({"crops_coords_top_left": (1, 2)}, "crops_coords_top_left is an argument of SDXL"),
        ({"clip_skip": 3}, "clip_skip is 3; give a whole number of layers, 0 to 2"),
        ({"clip_skip": -1}, "clip_skip is -1; give a whole number"),
        ({"clip_skip": 1.0}, "clip_skip is 1.0; give a whole number"),
        ({"cross_attention_kwargs": {"gligen": {}}}, "cross_attention_kwargs has 'gligen'; only 'scale'"),
        ({"cross_attention_kwargs": 0.5}, "cross_attention_kwargs is a float; give .'scale': number."),
        ({"cross_attention_kwargs": {"scale": None}}, "the scale in cross_attention_kwargs is None; give a finite"),
        ({"guidance_rescale": float("nan")}, "guidance_rescale is nan; give a finite number"),
        ({"timesteps": [1, 2], "sigmas": [1.0]}, "timesteps and sigmas were both given"),
        ({"timesteps": [900, 100]}, "DDIMScheduler takes no timesteps; leave them out, or set another scheduler"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_conditions_are_one_sentence(tiny_sd, settings, message):
    with pytest.raises(ModelError, match=message):
        pipeline(tiny_sd)(**{"prompt": "a mug", **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negative_prompt_embeds": torch.zeros(1, 24, 48)}, "and negative_pooled_prompt_embeds belong together"),
        ({"pooled_prompt_embeds": torch.zeros(1, 12)}, "prompt_embeds and pooled_prompt_embeds belong together"),
        (
            {"negative_prompt_embeds": torch.zeros(1, 24, 48), "negative_pooled_prompt_embeds": torch.zeros(1, 13)},
            r"negative_pooled_prompt_embeds is a Tensor of shape \(1, 13\); give a tensor of shape \(1, 12\)",
        ),
        ({"negative_prompt_2": "x"}, "negative_prompt_2 was given without negative_prompt; give both"),
        ({"prompt_2": ["x", "y"]}, "prompt_2 has 2 texts for 1 prompts; give one for all, or one each"),
        ({"original_size": 64}, "original_size is 64; give a pair of pixels"),
        ({"target_size": (64, -1)}, "give a pair of pixels"),
        ({"crops_coords_top_left": None}, "crops_coords_top_left is None; give a pair of pixels"),
        ({"clip_skip": 2}, "clip_skip is 2; give a whole number of layers, 0 to 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_conditions_of_sdxl_are_one_sentence(tiny_sdxl, settings, message):
    with pytest.raises(ModelError, match=message):
        pipeline(tiny_sdxl)("a mug", **settings)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([100, 1000], "timesteps go from 100 to 1000; give some of 0 to 999"),
        ([], "timesteps is a list; give a list of numbers"),
        (["x"], r"timesteps\[0\] is x; give a finite number"),
        ([100, 900], "the scheduler refuses these timesteps"),
    ],
)
def test_bad_timesteps_are_one_sentence(tiny_sd, timesteps, message):
    ours = pipeline(tiny_sd)
    ours.scheduler = diffusers.LCMScheduler.from_config(tiny_sd.scheduler.config)
    with pytest.raises(ModelError, match=message):
        draw(ours, "a mug", timesteps=timesteps)


def test_prompt_embeddings_are_refused_where_a_pseudo_word_needs_words(tiny_sd):
    with pytest.raises(
        ModelError, match="prompt_embeds were given, but the pseudo-word of 'mug' is placed in the prompt"
    ):
        draw(pipeline(tiny_sd), None, make_features(1), "mug", prompt_embeds=torch.zeros(1, 24, 20))
