"""A call of the pipelines end to end on tiny models, beside diffusers' own."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from model.backbones.segmenters.detection import Cut, Detection
from model.images.references import segment_photo
from model.methods.customcontrast.sampling import subject_tokens
from tests.world.models import FEATURE_LAYERS, FakeClip, make_features, tiny_sd, tokenizer, unet
from tests.world.pipelines import draw, pipeline, stock
from tests.world.subject import photo


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"negative_prompt": "blurred"},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"height": 24, "width": 16},
    ],
    ids=lambda settings: next(iter(settings), "default"),
)
def test_strength_zero_is_the_stock_pipeline_bit_for_bit(diffusion, settings):
    ours = pipeline(diffusion)
    found = draw(ours, "a mug on ice", make_features(1), "mug", subject_strength=0.0, **settings)
    assert torch.equal(found, draw(stock(diffusion, ours), "a mug on ice", **settings))
    assert torch.equal(found, draw(ours, "a mug on ice", **settings))


@pytest.mark.parametrize(
    "name",
    ["PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM", "TCD", "DDPM"],
)
def test_every_scheduler_draws_and_at_strength_zero_as_the_stock_pipeline_does(tiny_sd, name):
    ours = pipeline(tiny_sd)
    kind = getattr(diffusers, f"{name}Scheduler")
    built = stock(tiny_sd, ours)
    for one in (ours, built):
        one.scheduler = kind.from_config(
            tiny_sd.scheduler.config, **({"skip_prk_steps": True} if name == "PNDM" else {})
        )
    plain = draw(ours, "a mug on ice", make_features(1), "mug", subject_strength=0.0)
    assert torch.equal(plain, draw(built, "a mug on ice"))
    shown = draw(ours, "a mug on ice", make_features(1), "mug")
    assert torch.isfinite(shown).all() and not torch.equal(shown, plain)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("name", ["TCD", "DDIM"])
def test_eta_is_the_scheduler_s(tiny_sd, name, eta):
    ours = pipeline(tiny_sd)
    ours.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(tiny_sd.scheduler.config)
    found = draw(ours, "a mug", make_features(1), "mug", subject_strength=0.0, eta=eta)
    assert torch.equal(found, draw(stock(tiny_sd, ours), "a mug", eta=eta))
    assert torch.equal(found, draw(ours, "a mug")) == (eta == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_at_strength_zero_is_the_stock_pipeline(diffusion, dtype):
    for module in (diffusion.vae, diffusion.unet, *diffusion.text_encoders):
        module.to(dtype)
    ours = pipeline(diffusion)
    found = draw(ours, "a mug on ice", make_features(1), "mug", subject_strength=0.0)
    assert torch.equal(found, draw(stock(diffusion, ours), "a mug on ice"))


def test_vae_with_means_and_deviations_is_read_as_in_the_stock_pipeline(diffusion):
    diffusion.vae.register_to_config(latents_mean=[0.5, -0.5, 0.2, 0.0], latents_std=[2.0, 1.0, 0.5, 1.0])
    ours = pipeline(diffusion)
    assert torch.equal(draw(ours, "a mug"), draw(stock(diffusion, ours), "a mug"))


def test_unet_distilled_with_guidance_is_run_as_in_the_stock_pipeline():
    diffusion = tiny_sd()
    diffusion = replace(diffusion, unet=unet(20, time_cond_proj_dim=16).eval().requires_grad_(False))
    ours = pipeline(diffusion)
    found = draw(ours, "a mug", make_features(1), "mug", subject_strength=0.0, num_images_per_prompt=2)
    assert torch.equal(found, draw(stock(diffusion, ours), "a mug", num_images_per_prompt=2))
    assert not torch.equal(found, draw(ours, "a mug", num_images_per_prompt=2, guidance_scale=2.0))


def test_subject_changes_the_picture_and_so_does_its_strength(diffusion):
    ours = pipeline(diffusion)
    pictures = [draw(ours, "a mug", make_features(1), "mug", subject_strength=s) for s in (0.0, 0.5, 1.0)]
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[1], pictures[2])
    other = draw(ours, "a mug", make_features(1, seed=9), "mug", subject_strength=1.0)
    assert not torch.equal(pictures[2], other)


def test_same_token_for_all_levels_is_a_pseudo_word_in_the_stock_pipeline(diffusion):
    ours = pipeline(diffusion, rescale=False)
    words = [torch.randn(encoder.config.hidden_size) * 0.02 for encoder in diffusion.text_encoders]
    for head, word in zip(ours.adapter.mfi.textual.heads, words, strict=True):
        head.weight.data.zero_()
        head.bias.data = word
    for projection in ours.adapter.projections:
        projection.to_v.weight.data.zero_()
    found = draw(ours, "a mug on ice", make_features(1), "mug", location_masks=False)
    red = tokenizer()("red", add_special_tokens=False).input_ids
    assert len(red) == 1
    for encoder, word in zip(diffusion.text_encoders, words, strict=True):
        encoder.get_input_embeddings().weight.data[red] = word
    torch.testing.assert_close(found, draw(stock(diffusion, ours), "a mug red on ice"), rtol=1e-4, atol=1e-5)


def test_half_precision_backbone_draws_with_a_float32_adapter(diffusion):
    for module in (diffusion.vae, diffusion.unet, *diffusion.text_encoders):
        module.to(torch.bfloat16)
    assert torch.isfinite(draw(pipeline(diffusion), "a mug", make_features(1), "mug")).all()


def test_several_prompts_images_and_generators_come_in_order(diffusion):
    ours = pipeline(diffusion)
    prompts = ["a mug on ice", "a photo of a mug"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "pt"}
    found = ours(prompts, make_features(1), "mug", num_images_per_prompt=2, generator=generators, **settings).images
    for place, (prompt, seed) in enumerate([(prompts[0], 0), (prompts[0], 1), (prompts[1], 2), (prompts[1], 3)]):
        alone = draw(ours, prompt, make_features(1), "mug", seed=seed)[0]
        torch.testing.assert_close(found[place], alone, rtol=1e-3, atol=1e-4)


def test_negative_prompts_are_one_for_all_or_one_each(diffusion):
    ours = pipeline(diffusion)
    prompts = ["a mug on ice", "a photo of a mug"]
    for given in (["blurred"], ("blurred",)):
        found = draw(ours, "a mug", make_features(1), "mug", negative_prompt=given)
        assert torch.equal(found, draw(ours, "a mug", make_features(1), "mug", negative_prompt="blurred"))
    settings = {"negative_prompt": ["blurred", "grey"], "num_images_per_prompt": 2}
    assert torch.equal(draw(ours, prompts, **settings), draw(stock(diffusion, ours), prompts, **settings))


def test_text_batch_does_not_change_the_picture(diffusion):
    ours = pipeline(diffusion)
    torch.testing.assert_close(
        draw(ours, "a mug", make_features(1), "mug", text_batch=1),
        draw(ours, "a mug", make_features(1), "mug", text_batch=10_000),
        rtol=1e-4,
        atol=1e-5,
    )


def test_two_subjects_have_a_location_map_each(diffusion):
    ours = pipeline(diffusion)
    seen = []

    def keep(pipe, step, t, tensors):
        seen.append((t, tensors["location"]))
        return {}

    steps = {"num_inference_steps": 5, "callback_on_step_end": keep}
    masked = draw(ours, "a mug and a dog", make_features(2), ["mug", "dog"], num_images_per_prompt=2, **steps)
    assert masked.shape[0] == 2 and torch.isfinite(masked).all()
    for _, location in seen:
        assert location is not None and location.shape == (2, 2, 8, 8)
        assert location.min() >= 0 and location.max() <= 1
    bare = draw(ours, "a mug and a dog", make_features(2), ["mug", "dog"], location_masks=False, **steps)
    assert seen[-1][1] is None and not torch.equal(masked[:1], bare)


def test_location_masks_are_used_as_the_adapter_says_unless_the_call_does(diffusion):
    kind = {"location_start": 1000}
    for says in (True, False):
        ours = pipeline(diffusion, location_masks=says)
        found = draw(ours, "a mug", make_features(1), "mug", **kind)
        assert torch.equal(found, draw(ours, "a mug", make_features(1), "mug", location_masks=says, **kind))
        assert not torch.equal(found, draw(ours, "a mug", make_features(1), "mug", location_masks=not says, **kind))


def test_location_map_acts_below_its_start_only(diffusion):
    ours = pipeline(diffusion)
    plain = draw(ours, "a mug", make_features(1), "mug", location_masks=False)
    assert torch.equal(draw(ours, "a mug", make_features(1), "mug", location_start=0), plain)
    assert not torch.equal(draw(ours, "a mug", make_features(1), "mug", location_start=1000), plain)


@pytest.mark.parametrize(
    "switches",
    [
        {"textual": False, "tv_fusion": False},
        {"tv_fusion": False},
        {"text_tokens": 2, "visual_scope": "own"},
    ],
    ids=["visual-only", "no-fusion", "own-tokens"],
)
def test_every_variant_of_the_encoder_draws(diffusion, switches):
    picture = draw(pipeline(diffusion, **switches), "a mug", make_features(1), "mug")
    assert picture.shape == (1, 3, 16, 16) and torch.isfinite(picture).all()


def test_photos_go_through_the_image_encoder_and_come_out_as_pictures(diffusion):
    encoder, photo = FakeClip(), Image.new("RGB", (20, 20), "white")
    out = pipeline(diffusion, encoder)("a mug", photo, "mug", num_inference_steps=2).images
    assert encoder.seen == [([photo], FEATURE_LAYERS)]
    assert out[0].size == (16, 16) and np.asarray(out[0]).std() > 0


def test_subjects_are_named_in_plain_words(tiny_sd):
    """By a mask, by transparency, by Grounded SAM: the encoder sees the same segment."""
    encoder = FakeClip()
    ours = pipeline(tiny_sd, encoder)
    image, mask = photo()
    cut = image.convert("RGBA")
    cut.putalpha(Image.fromarray(mask))
    segment = segment_photo(cut, "mug", lambda: pytest.fail("nothing is to be found"))
    ours._finder = Finder(mask)  # type: ignore[assignment]
    drawn = [
        draw(ours, "a mug on ice", subjects={"mug": given})
        for given in (cut, (image, mask), (image, Image.fromarray(mask)), image)
    ]
    assert all(torch.equal(picture, drawn[0]) for picture in drawn)
    assert torch.equal(drawn[0], draw(ours, "a mug on ice", segment, "mug"))
    assert all(np.array_equal(images[0], segment) for images, _ in encoder.seen)
    draw(ours, "a mug and a dog", subjects={"dog": cut, "mug": [cut, cut]})
    assert len(encoder.seen[-1][0]) == 3


def test_tokens_of_several_photos_of_a_subject_are_averaged(tiny_sd):
    ours = pipeline(tiny_sd, FakeClip())
    white = Image.new("RGB", (8, 8), "white")
    steps = torch.tensor([800, 200])
    three = make_features(3)
    ours.image_encoder.hidden_states = lambda images, layers: three[: len(images)]
    found = subject_tokens(ours.adapter, *ours.hidden_states([[white, white], white], 2), steps)
    alone = subject_tokens(ours.adapter, *ours.hidden_states(three, 3), steps)
    for averaged, every in ((found.visual_tokens, alone.visual_tokens), (found.s_plus[0], alone.s_plus[0])):
        torch.testing.assert_close(averaged, torch.stack([(every[0] + every[1]) / 2, every[2]]))


class Finder:
    """A Grounded SAM that finds what it is told to find."""

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask

    def cut_one(self, image, phrase):
        return Detection((0, 0, 9, 9), 0.9), Cut(self.mask, 0.9)


@pytest.mark.parametrize("every", [1, 2, 5, 100])
def test_steps_share_the_text_of_the_first_of_them(tiny_sd, every):
    ours = pipeline(tiny_sd)
    asked = []
    encode = ours.adapter.mfi.at_timesteps
    ours.adapter.mfi.at_timesteps = lambda *given: asked.append(given[1].tolist()) or encode(*given)
    settings = {"num_inference_steps": 5, "text_every": every}
    pictures = [draw(ours, "a mug", make_features(1), "mug", text_batch=size, **settings) for size in (1, 256)]
    ours.scheduler.set_timesteps(5)
    assert asked[0] == ours.scheduler.timesteps.tolist()[::every]
    torch.testing.assert_close(pictures[0], pictures[1], rtol=1e-4, atol=1e-5)
    plain = draw(ours, "a mug", make_features(1), "mug", num_inference_steps=5)
    assert torch.equal(pictures[1], plain) == (every == 1)


def test_generators_may_be_a_tuple(tiny_sd):
    ours = pipeline(tiny_sd)
    settings = {"num_inference_steps": 1, "num_images_per_prompt": 2, "output_type": "pt"}
    found = [
        ours("a mug", generator=kind(torch.Generator().manual_seed(seed) for seed in (1, 2)), **settings).images
        for kind in (list, tuple)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_is_of_the_type_that_the_stock_pipeline_gives(diffusion, output_type):
    ours = pipeline(diffusion)
    settings = {"output_type": output_type, "num_images_per_prompt": 2}
    found, expected = (draw(one, "a mug", **settings) for one in (ours, stock(diffusion, ours)))
    assert type(found) is type(expected) and len(found) == 2
    assert all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(found, expected, strict=True))


def test_grounded_sam_is_not_needed_without_a_subject(tiny_sd):
    ours = pipeline(tiny_sd)
    found = draw(ours, "a mug", subjects={"mug": photo()[0]}, subject_strength=0.0)
    assert torch.equal(found, draw(ours, "a mug"))
