"""ControlNets beside the adapter, beside diffusers' own pipelines with the same ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetUnionModel
from diffusers.callbacks import SDCFGCutoffCallback, SDXLControlnetCFGCutoffCallback
from PIL import Image

from model.pipeline import build_pipeline
from runtime.errors import ModelError
from tests.world.models import make_adapter, make_features
from tests.world.pipelines import controlled, controlnet, draw, edges

PROMPTS = ["a mug on ice", "a photo of a mug"]


def photo(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.fromarray((edges(1, seed, size)[0].permute(1, 2, 0) * 255).byte().numpy())


def test_controlnet_goes_beside_the_adapter(diffusion):
    ours, loaded = controlled(diffusion, controlnet(diffusion))
    settings = {"controlnet_conditioning_scale": 0.7, "num_images_per_prompt": 2}
    expected = draw(loaded, "a mug on ice", image=edges(1), **settings)
    assert torch.equal(draw(ours, "a mug on ice", control_image=edges(1), **settings), expected)
    shown = draw(ours, "a mug on ice", make_features(1), "mug", control_image=edges(1), **settings)
    assert torch.isfinite(shown).all() and not torch.equal(shown, expected)
    for given in (edges(1), edges(2, seed=1), [*edges(2, seed=1)]):  # one for all, one per prompt
        expected = draw(loaded, PROMPTS, image=given, **settings)
        assert torch.equal(draw(ours, PROMPTS, control_image=given, **settings), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"control_guidance_start": 0.3},
        {"control_guidance_end": 0.5},
        {"control_guidance_start": [0.2], "control_guidance_end": 0.7},
        {"guess_mode": True},
        {"guess_mode": True, "guidance_scale": 1.0},
    ],
    ids=str,
)
def test_controlnet_acts_when_and_where_it_does_in_the_stock_pipeline(diffusion, settings):
    ours, loaded = controlled(diffusion, controlnet(diffusion))
    settings = {"num_inference_steps": 5, "num_images_per_prompt": 2, **settings}
    found = draw(ours, "a mug", make_features(1), "mug", subject_strength=0.0, control_image=edges(1), **settings)
    assert torch.equal(found, draw(loaded, "a mug", image=edges(1), **settings))
    guided = {name: value for name, value in settings.items() if name in ("guidance_scale", "num_inference_steps")}
    assert not torch.equal(found, draw(ours, "a mug", control_image=edges(1), num_images_per_prompt=2, **guided))
    shown = draw(ours, "a mug", make_features(1), "mug", control_image=edges(1), **settings)
    assert torch.isfinite(shown).all() and not torch.equal(shown, found)


def test_controlnet_that_pools_its_conditions_is_in_guess_mode(tiny_sd):
    network = controlnet(tiny_sd)
    network.register_to_config(global_pool_conditions=True)
    ours, loaded = controlled(tiny_sd, network)
    assert torch.equal(draw(ours, "a mug", control_image=edges(1)), draw(loaded, "a mug", image=edges(1)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"controlnet_conditioning_scale": [0.5, 1.3], "guess_mode": True},
        {"control_guidance_start": [0.0, 0.4], "control_guidance_end": [0.6, 1.0]},
        {"control_guidance_end": 0.5, "controlnet_conditioning_scale": 0.8},
    ],
    ids=str,
)
def test_several_controlnets_act_together_as_in_the_stock_pipeline(diffusion, settings):
    ours, loaded = controlled(diffusion, [controlnet(diffusion), controlnet(diffusion, seed=6)])
    images = [edges(1), edges(1, seed=1)]
    settings = {"num_images_per_prompt": 2, "num_inference_steps": 5, **settings}
    found = draw(ours, "a mug on ice", control_image=images, **settings)
    assert torch.equal(found, draw(loaded, "a mug on ice", image=images, **settings))
    assert not torch.equal(found, draw(ours, "a mug on ice", control_image=images[::-1], **settings))
    shown = draw(ours, "a mug on ice", make_features(1), "mug", control_image=images, **settings)
    assert torch.isfinite(shown).all() and not torch.equal(shown, found)
    seen = []
    names = {"callback_on_step_end_tensor_inputs": ["image"]}
    again = {"callback_on_step_end": lambda pipe, step, t, tensors: seen.append(tensors) or tensors, **names}
    assert torch.equal(draw(ours, "a mug on ice", control_image=images, **settings, **again), found)
    assert [len(tensors["image"]) for tensors in seen] == [2] * 5


def test_several_controlnets_take_a_list_of_images_for_each_prompt(tiny_sd):
    ours, loaded = controlled(tiny_sd, [controlnet(tiny_sd), controlnet(tiny_sd, seed=6)])
    nested = [[photo(1), photo(2)], [photo(3), photo(4)]]
    assert torch.equal(draw(ours, PROMPTS, control_image=nested), draw(loaded, PROMPTS, image=nested))
    ours = type(ours)(**{**ours.components, "controlnet": [controlnet(tiny_sd), controlnet(tiny_sd, seed=6)]})
    ours.set_progress_bar_config(disable=True)
    assert torch.equal(draw(ours, PROMPTS, control_image=nested), draw(loaded, PROMPTS, image=nested))


def test_callback_gets_every_tensor_that_it_gets_in_the_stock_pipeline(diffusion):
    ours, loaded = controlled(diffusion, controlnet(diffusion))
    seen: list[dict[str, torch.Tensor]] = []
    names = loaded._callback_tensor_inputs
    settings = {"num_images_per_prompt": 2, "callback_on_step_end_tensor_inputs": names, "negative_prompt": "blurred"}
    settings |= {
        "num_inference_steps": 1,
        "callback_on_step_end": lambda *given: seen.append(dict(given[3])) or given[3],
    }
    for one, name in ((ours, "control_image"), (loaded, "image")):
        draw(one, "a mug", **{name: edges(1)}, **settings)
    assert seen[0].keys() == set(names)
    assert all(torch.equal(found, seen[1][name]) for name, found in seen[0].items())


@pytest.mark.parametrize("guess_mode", [False, True])
def test_callback_that_turns_guidance_off_does_so_for_the_controlnet(diffusion, guess_mode):
    ours, loaded = controlled(diffusion, controlnet(diffusion))
    xl = len(diffusion.text_encoders) > 1
    cutoff: Any = SDXLControlnetCFGCutoffCallback if xl else SDCFGCutoffCallback
    settings = {"num_inference_steps": 5, "guess_mode": guess_mode}
    found = draw(ours, "a mug", control_image=edges(1), **settings, callback_on_step_end=cutoff(cutoff_step_ratio=0.4))
    assert torch.isfinite(found).all()
    assert not torch.equal(found, draw(ours, "a mug", control_image=edges(1), **settings))
    if xl:  # the callback of Stable Diffusion leaves its stock pipeline with an image for both halves
        settings["callback_on_step_end"] = cutoff(cutoff_step_ratio=0.4)
        assert torch.equal(found, draw(loaded, "a mug", image=edges(1), **settings))


@pytest.mark.parametrize("size", [{}, {"height": 16}, {"height": 24, "width": 20}], ids=str)
def test_images_have_the_size_of_the_control_image(diffusion, size):
    ours, loaded = controlled(diffusion, controlnet(diffusion))
    for given in (edges(1, size=(12, 24)), photo(0, (13, 24))):
        found = draw(ours, "a mug", control_image=given, **size)
        assert found.shape[-2:] == (size.get("height", 12), size.get("width", 24))
        assert torch.equal(found, draw(loaded, "a mug", image=given, **size))


def test_what_does_not_fit_a_controlnet_is_refused(tiny_sd):
    ours, _ = controlled(tiny_sd, controlnet(tiny_sd))
    one, spans = edges(1), "give parts of the steps, 0 <= start < end <= 1"
    for settings, message in (
        ({}, "give both or neither"),
        ({"control_image": edges(3)}, "3 control images for 2 prompts; give one, or one per prompt"),
        ({"control_image": edges(4)}, "4 control images for 2 prompts"),
        ({"control_image": []}, "control_image cannot be read"),
        ({"control_image": "edges.png"}, "control_image cannot be read"),
        ({"control_image": one[:, :1]}, "control_image has 1 channels, but the ControlNet reads 3"),
        ({"control_image": one * 255}, "control_image has values that are not in 0..1"),
        ({"control_image": one * torch.nan}, "control_image has values that are not in 0..1"),
        ({"control_image": one, "control_guidance_start": 0.5, "control_guidance_end": 0.5}, spans),
        ({"control_image": one, "control_guidance_start": -0.1}, spans),
        ({"control_image": one, "control_guidance_end": 1.5}, spans),
        ({"control_image": one, "control_guidance_end": [0.5, 0.6]}, "control_guidance_end has 2 numbers for 1"),
        ({"control_image": one, "controlnet_conditioning_scale": "1"}, "scale is 1; give a finite number"),
    ):
        with pytest.raises(ModelError, match=message):
            draw(ours, PROMPTS, **settings)


def test_what_does_not_fit_several_controlnets_is_refused(tiny_sd):
    ours, _ = controlled(tiny_sd, [controlnet(tiny_sd), controlnet(tiny_sd, seed=6)])
    for given, message in (
        (edges(2), "there are 2 ControlNets; give a list of as many control images"),
        ([], "there are 2 ControlNets; give a list"),
        ([edges(1)], "1 control images for 2 ControlNets; give one each"),
        ([[photo(0)], [photo(1)]], "give as many control images for each prompt"),
        ([[photo(0), photo(1)], photo(2)], "give as many control images for each prompt"),
        ([edges(1), edges(1, size=(24, 24))], "the control images have different sizes; give height and width"),
    ):
        with pytest.raises(ModelError, match=message):
            draw(ours, PROMPTS, control_image=given)
    with pytest.raises(ModelError, match="controlnet_conditioning_scale has 3 numbers for 2 ControlNets; give one"):
        draw(ours, PROMPTS, control_image=[edges(1)] * 2, controlnet_conditioning_scale=[1.0, 1.0, 1.0])


def test_controlnet_of_another_kind_is_refused_by_its_name(tiny_sdxl):
    built = build_pipeline(tiny_sdxl, make_adapter(tiny_sdxl))
    union = ControlNetUnionModel.from_unet(tiny_sdxl.unet)
    with pytest.raises(ModelError, match="the ControlNet is a ControlNetUnionModel; give a ControlNetModel, or a list"):
        type(built)(**{**built.components, "controlnet": union})
