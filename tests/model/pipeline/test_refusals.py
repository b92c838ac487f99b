"""What a call refuses, in one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionAdapterPipeline, T2IAdapter
from PIL import Image

from model.images.references import is_coloured_photo, segment_photo
from model.pipeline import CustomContrastPipeline, CustomContrastXLPipeline, build_pipeline
from runtime.errors import ModelError
from tests.world.models import FakeClip, make_adapter, make_features, tiny_sd, unet
from tests.world.pipelines import pipeline
from tests.world.subject import photo

CALLBACK = {"callback_on_step_end": lambda *given: {}}
COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))


def test_unknown_argument_is_refused_by_name(tiny_sd):
    with pytest.raises(TypeError, match="unexpected keyword argument 'subjetcs'"):
        pipeline(tiny_sd)("a dog", subjetcs={"dog": COLOURS})


def test_masks_in_two_colours_are_masks(tmp_path):
    """Grey, coloured, soft, as JPEG, in the alpha channel, as an array; a photo in colour is none of these."""
    _, mask = photo(160, 120, (20, 30, 110, 90))
    grey = Image.fromarray(mask).convert("L")
    red = Image.merge("RGB", [grey, Image.new("L", grey.size, 40), Image.new("L", grey.size, 90)])
    red.save(tmp_path / "red.jpg", quality=40)
    cut = COLOURS.resize(grey.size)
    cut.putalpha(grey)
    soft = red.resize((99, 77), Image.Resampling.BICUBIC)
    for given in (grey, Image.fromarray(mask), red, soft, Image.open(tmp_path / "red.jpg"), cut, mask, np.asarray(red)):
        assert not is_coloured_photo(given)
    assert is_coloured_photo(COLOURS) and is_coloured_photo(np.asarray(COLOURS))
    with pytest.raises(ModelError, match="the photo of 'mug': the mask given with it is a photo in colour; give"):
        segment_photo((COLOURS, COLOURS), "mug", lambda: pytest.fail("nothing is to be found"))


def test_pipeline_class_follows_the_text_encoders():
    assert type(pipeline(tiny_sd())) is CustomContrastPipeline
    first = tiny_sd()
    with pytest.raises(ModelError, match="CustomContrastXLPipeline takes 2 text encoder"):
        CustomContrastXLPipeline.from_diffusion(first, make_adapter(first))


def test_base_model_for_inpainting_is_refused(tiny_sd):
    inpainting = replace(tiny_sd, unet=unet(20, in_channels=9))
    with pytest.raises(ModelError, match="the UNet reads 9 latent channels, but the VAE has 4; load a text-to-image"):
        build_pipeline(inpainting, make_adapter(inpainting))


def test_loaded_pipeline_with_a_part_that_would_be_left_out_is_refused(tiny_sd):
    ours = pipeline(tiny_sd)
    parts = {name: part for name, part in ours.to_stock().components.items() if name != "image_encoder"}
    t2i = T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2)
    loaded = StableDiffusionAdapterPipeline(**parts, adapter=t2i, requires_safety_checker=False)
    with pytest.raises(ModelError, match=r"has a part .adapter. .T2IAdapter., which this one has no use for; give one"):
        CustomContrastPipeline.from_pipe(loaded, ours.adapter)


def test_another_image_encoder_is_refused_by_name(tiny_sd):
    with pytest.raises(ModelError, match="trained on image encoder 'tiny-clip', but 'dino' is loaded"):
        build_pipeline(tiny_sd, make_adapter(tiny_sd), FakeClip("dino"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("a dog", make_features(1), "mug"), {}, "caption 'a dog' has no class noun 'mug'"),
        (("a dog", make_features(2), "dog"), {}, "2 references and 1 class nouns"),
        (("a dog", make_features(1)[0], "dog"), {}, "3 references and 1"),
        (("a dog", make_features(1)[..., :5], "dog"), {}, "hidden states of 'tiny-clip'"),
        (("a dog", Image.new("RGB", (8, 8)), "dog"), {}, "no image encoder; pass one"),
        (("a dog",), {"subjects": {"dog": Image.new("RGB", (8, 8))}}, "no Grounded SAM is configured; pass photos"),
        (("a cat",), {"subjects": {"dog": Image.new("RGB", (8, 8))}}, "caption 'a cat' has no class noun 'dog'"),
        (("a dog", make_features(1), "dog"), {"subjects": {}}, "subjects and references were both given"),
        (("a dog",), {"subjects": {}}, "0 references and 0 class nouns"),
        (("a dog",), {"control_image": torch.zeros(1, 3, 16, 16)}, "give both or neither"),
        (("a dog",), {"text_every": 0}, "text_every is 0; give a whole number, at least 1"),
        (([],), {}, "no prompt"),
        ((["a dog", 3],), {}, "prompt contains a int; give text"),
        (
            ("a dog",),
            {"negative_prompt": ["x", "y"]},
            "negative_prompt has 2 texts for 1 prompts; give one for all, or one each",
        ),
        (("a dog",), {"negative_prompt": []}, "negative_prompt has 0 texts for 1 prompts"),
        (("a dog",), {"negative_prompt": [None]}, "negative_prompt contains a NoneType; give text"),
        (("a dog",), {"negative_prompt": 3}, "negative_prompt contains a int; give text"),
        (("a dog",), {"subjects": {"dog": []}}, "the list of photos of 'dog' is empty; give at least one"),
        (("a dog",), {"subjects": {"dog": (COLOURS, COLOURS)}}, "is a photo, not a mask; give .photo, photo. for two"),
        (("a dog",), {"subjects": {"dog": (COLOURS, np.asarray(COLOURS))}}, "is a photo, not a mask"),
        (("a dog",), {"subjects": {"dog": (COLOURS,)}}, "is a tuple of 1; give .photo, mask."),
        (("a dog",), {"subjects": {"dog": (COLOURS, None)}}, "the mask of a photo of 'dog' is None"),
        (("a dog",), {"subjects": {"dog": (COLOURS, "mask.png")}}, "the text 'mask.png'; give a PIL image or an array"),
        (("a dog",), {"subjects": {"dog": "dog.jpg"}}, "a photo of 'dog' is the text 'dog.jpg'; give a PIL image"),
        (("a dog",), {"subjects": {"dog": Path("dog.jpg")}}, "a photo of 'dog' is a PosixPath; give a PIL image"),
        (("a dog",), {"subjects": {"dog": np.asarray(COLOURS)}}, "is a ndarray of shape .24, 24, 3.; give a PIL image"),
        (("a dog",), {"subjects": {"dog": None}}, "a photo of 'dog' is a NoneType; give a PIL image"),
        (("a dog",), {"subjects": [COLOURS]}, "subjects is a list; give .class noun: photo."),
        (("a dog",), {"subjects": {3: COLOURS}}, "class_nouns contains a int; give text"),
        (("a dog", [[]], "dog"), {}, "the list of photos of reference 0 is empty"),
        (("a dog", "dog.jpg", "dog"), {}, "references is the text 'dog.jpg'; give PIL images"),
        (("a dog", ["dog.jpg"], "dog"), {}, "reference 0 is the text 'dog.jpg'; give a PIL image"),
        (("a dog", make_features(1) * torch.nan, "dog"), {}, "reference features contain NaN or infinite values"),
        (("a dog", make_features(1), "dog"), {"subject_strength": float("nan")}, "subject_strength is nan; give a fin"),
        (("a dog", make_features(1), "dog"), {"subject_strength": float("inf")}, "subject_strength is inf; give a fin"),
        (("a dog",), {"guidance_scale": float("nan")}, "guidance_scale is nan; give a finite number"),
        (("a dog",), {"guidance_scale": "7"}, "guidance_scale is 7; give a finite number"),
        (("a dog",), {"num_images_per_prompt": 0}, "num_images_per_prompt is 0; give a whole number, at least 1"),
        (("a dog",), {"height": -16}, "height is -16; give a whole number, at least 1"),
        (("a dog",), {"width": 0}, "width is 0; give a whole number, at least 1"),
        (("a dog",), {"width": 16.0}, "width is 16.0; give a whole number, at least 1"),
        (("a dog",), {"num_inference_steps": 2.5}, "num_inference_steps is 2.5; give a whole number"),
        (("a dog",), {"output_type": "png"}, "output_type is 'png'; use pil, np, pt, latent"),
        (("a dog",), {"latents": torch.full((1, 4, 8, 8), torch.nan)}, "latents contain NaN or infinite values"),
        (("a dog",), {"height": 17}, "not a multiple of 2"),
        (("a dog",), {"num_inference_steps": 0}, "at least 1"),
        (("a dog",), {"num_inference_steps": 1001}, "is 1001, but the base model was trained on 1000 timesteps"),
        (("a dog", make_features(1), "dog"), {"subject_strength": -1.0}, "give 0"),
        (("a dog",), {"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
        (("a dog",), {"generator": 3}, "generator is a int; give a torch.Generator, or a list of one per image"),
        (("a dog",), {"generator": [None]}, "generator is a NoneType; give a torch.Generator"),
        (("a dog",), {"latents": torch.zeros(1, 4, 4, 4)}, "latents is a Tensor of shape .1, 4, 4, 4., but the images"),
        (("a dog",), {"latents": np.zeros((1, 4, 8, 8))}, "latents is a ndarray of shape .1, 4, 8, 8., but the images"),
        (("a dog", make_features(1), 3), {}, "class_nouns contains a int; give text"),
        (("a dog", make_features(1), {"dog"}), {}, "class_nouns contains a set; give text"),
        (("a dog", make_features(1), None), {}, "1 references and 0 class nouns; give one noun per reference"),
        (({"a dog"},), {}, "prompt contains a set; give text"),
        ((3,), {}, "prompt contains a int; give text"),
        ((), {}, "no prompt was given; give one or several, or prompt_embeds"),
        (("a dog",), {"callback_on_step_end": 3}, "callback_on_step_end is a int; give a function"),
        (("a dog",), {"callback_on_step_end": [print]}, "callback_on_step_end is a list; give a function"),
        (
            ("a dog",),
            CALLBACK | {"callback_on_step_end_tensor_inputs": "latents"},
            "is the text 'latents'; give a list",
        ),
        (("a dog",), CALLBACK | {"callback_on_step_end_tensor_inputs": None}, "is a NoneType; give a list of names"),
    ],
)
def test_bad_arguments_are_one_sentence(tiny_sd, arguments, settings, message):
    with pytest.raises(ModelError, match=message):
        pipeline(tiny_sd)(*arguments, **settings)


def test_photos_that_cannot_be_read_are_refused_before_anything_is_loaded(tiny_sd, tmp_path):
    ours = pipeline(tiny_sd)
    COLOURS.resize((200, 200)).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])
    closed = Image.open(tmp_path / "whole.jpg")
    closed.close()
    for opened in (lambda: Image.open(tmp_path / "half.jpg"), lambda: closed):
        with pytest.raises(ModelError, match=r"a photo of 'dog' cannot be read .*; open a complete image file"):
            ours("a dog", subjects={"dog": opened()})
        for given in (opened(), [opened()], [[opened()]]):
            with pytest.raises(ModelError, match=r"reference 0 cannot be read .*; open a complete image file"):
                ours("a dog", given, "dog")


def test_pipeline_is_made_of_a_pipeline_and_an_adapter(tiny_sd):
    ours = pipeline(tiny_sd)
    with pytest.raises(ModelError, match="the pipeline is the text 'sd'; give a loaded one, or use from_pretrained"):
        type(ours).from_pipe("sd", ours.adapter)
    with pytest.raises(ModelError, match="adapter is a NoneType; give an adapter, or its folder or repository"):
        type(ours).from_pipe(ours, None)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"adapter is an? int; give an adapter, or its folder or repository"):
        type(ours).from_pretrained("nowhere", 5)  # type: ignore[arg-type]
    ours.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler is no scheduler for Stable Diffusion; set"):
        ours("a dog")
