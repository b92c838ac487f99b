"""The pipelines end to end on tiny models, beside diffusers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from model.errors import ModelError
from model.pipeline import CustomContrastPipeline, CustomContrastXLPipeline, build_pipeline
from tests.model.tiny_models import FEATURE_LAYERS, TinyDiffusion, make_adapter, make_features, tiny_sd, tokenizer

KINDS = ["tiny_sd", "tiny_sdxl"]


@pytest.fixture(params=KINDS)
def diffusion(request) -> TinyDiffusion:
    return request.getfixturevalue(request.param)


def pipeline(diffusion: TinyDiffusion, image_encoder: Any = None, **sizes: Any) -> CustomContrastPipeline:
    built = build_pipeline(diffusion, make_adapter(diffusion, **sizes), image_encoder)
    built.set_progress_bar_config(disable=True)
    return built


def stock(diffusion: TinyDiffusion, ours: CustomContrastPipeline) -> Any:
    parts = {"vae": diffusion.vae, "unet": diffusion.unet, "scheduler": ours.scheduler}
    for index, name in enumerate(["", "_2"][: len(diffusion.text_encoders)]):
        parts |= {
            f"text_encoder{name}": diffusion.text_encoders[index],
            f"tokenizer{name}": diffusion.tokenizers[index],
        }
    if len(diffusion.text_encoders) > 1:
        built: Any = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        built = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    built.set_progress_bar_config(disable=True)
    return built


def draw(built: Any, prompt: Any, *args: Any, seed: int = 0, **settings: Any) -> torch.Tensor:
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "pt", **settings}
    return built(prompt, *args, generator=torch.Generator().manual_seed(seed), **settings).images


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


class FakeClip:
    """An image encoder that remembers what it was asked."""

    def __init__(self, name: str = "tiny-clip") -> None:
        self.name, self.seen = name, []

    def hidden_states(self, images, layers):
        self.seen.append((images, layers))
        return make_features(len(images))


def test_photos_go_through_the_image_encoder_and_come_out_as_pictures(diffusion):
    encoder, photo = FakeClip(), Image.new("RGB", (20, 20), "white")
    out = pipeline(diffusion, encoder)("a mug", photo, "mug", num_inference_steps=2).images
    assert encoder.seen == [([photo], FEATURE_LAYERS)]
    assert out[0].size == (16, 16) and np.asarray(out[0]).std() > 0


def test_pipeline_class_follows_the_text_encoders():
    assert type(pipeline(tiny_sd())) is CustomContrastPipeline
    first = tiny_sd()
    with pytest.raises(ModelError, match="CustomContrastXLPipeline has 2 text encoder"):
        CustomContrastXLPipeline.from_diffusion(first, make_adapter(first))


def test_another_image_encoder_is_refused_by_name(tiny_sd):
    with pytest.raises(ModelError, match="trained on image encoder 'tiny-clip' and 'dino' is loaded"):
        build_pipeline(tiny_sd, make_adapter(tiny_sd), FakeClip("dino"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("a dog", make_features(1), "mug"), {}, "caption 'a dog' has no class noun 'mug'"),
        (("a dog", make_features(2), "dog"), {}, "2 references and 1 class nouns"),
        (("a dog", make_features(1)[0], "dog"), {}, "3 references and 1"),
        (("a dog", make_features(1)[..., :5], "dog"), {}, "hidden states of 'tiny-clip'"),
        (("a dog", Image.new("RGB", (8, 8)), "dog"), {}, "no image encoder; pass one"),
        (([],), {}, "no prompt"),
        (("a dog",), {"height": 17}, "no multiple of 2"),
        (("a dog",), {"num_inference_steps": 0}, "at least 1"),
        (("a dog", make_features(1), "dog"), {"subject_strength": -1.0}, "give 0"),
        (("a dog",), {"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
        (("a dog",), {"latents": torch.zeros(1, 4, 4, 4)}, "latents are"),
    ],
)
def test_bad_arguments_are_one_sentence(tiny_sd, arguments, settings, message):
    with pytest.raises(ModelError, match=message):
        pipeline(tiny_sd)(*arguments, **settings)
