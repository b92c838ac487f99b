"""Callbacks at the end of a step, beside diffusers' own pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.callbacks import (
    MultiPipelineCallbacks,
    SD3CFGCutoffCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)

from runtime.errors import ModelError
from tests.world.models import make_features
from tests.world.pipelines import KINDS, draw, pipeline, stock


def test_callback_gets_what_it_asks_for_and_may_change_the_latents(tiny_sd):
    ours, seen = pipeline(tiny_sd), []

    def halve(pipe, step, t, tensors):
        seen.append(sorted(tensors))
        return {"latents": tensors["latents"] / 2}

    settings = {"callback_on_step_end": halve, "output_type": "latent"}
    few = {"num_inference_steps": 1}
    changed = draw(ours, "a mug", callback_on_step_end_tensor_inputs=["latents"], **settings, **few)
    assert torch.equal(changed, draw(ours, "a mug", output_type="latent", **few) / 2)
    draw(ours, "a mug", **settings, **few)
    assert seen == [["latents"], ["latents", "location"]]
    (images,) = ours("a mug", num_inference_steps=1, output_type="latent", return_dict=False)
    assert images.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("subject", [False, True])
def test_interrupt_of_a_callback_stops_after_its_step(tiny_sd, subject):
    ours, calls, kept = pipeline(tiny_sd), [], []

    def stop(pipe, step, t, tensors):
        calls.append((step, t.item(), pipe.interrupt, pipe.num_timesteps))
        pipe._interrupt = step == 1
        kept.append(tensors["latents"])
        return tensors

    references = (make_features(1), "mug") if subject else ()
    settings = {"num_inference_steps": 6, "callback_on_step_end": stop, "output_type": "latent"}
    found = draw(ours, "a mug", *references, **settings)
    ours.scheduler.set_timesteps(6)
    assert calls == [(step, ours.scheduler.timesteps[step].item(), False, 6) for step in (0, 1)]
    assert torch.equal(found, kept[1])
    if not subject:
        assert torch.equal(found, draw(stock(tiny_sd, ours), "a mug", **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_callbacks_of_diffusers_do_what_they_do_in_the_stock_pipeline(kind, request):
    diffusion = request.getfixturevalue(kind)
    ours = pipeline(diffusion)
    cutoff: Any = SDXLCFGCutoffCallback if kind == "tiny_sdxl" else SDCFGCutoffCallback
    settings = {"num_inference_steps": 5, "callback_on_step_end": cutoff(cutoff_step_ratio=0.4)}
    found = draw(ours, "a mug", **settings)
    assert not ours.do_classifier_free_guidance and ours.guidance_scale == 0
    assert torch.equal(found, draw(stock(diffusion, ours), "a mug", **settings))
    assert not torch.equal(found, draw(ours, "a mug", num_inference_steps=5))
    settings["callback_on_step_end"] = MultiPipelineCallbacks([cutoff(cutoff_step_ratio=0.4)])
    assert torch.equal(found, draw(ours, "a mug", **settings))
    shown = draw(ours, ["a mug", "a red mug"], make_features(1), "mug", num_images_per_prompt=2, **settings)
    assert torch.isfinite(shown).all()
    with pytest.raises(ModelError, match="the callback asks for 'pooled_prompt_embeds', but there are only latents"):
        draw(ours, "a mug", callback_on_step_end=SD3CFGCutoffCallback(cutoff_step_ratio=0.4))


@pytest.mark.parametrize(("start", "then"), [(5.0, 2.0), (5.0, 0.0), (1.0, 5.0)])
def test_guidance_that_a_callback_sets_is_that_of_the_next_steps(diffusion, start, then):
    """A step at a time, each a call of its own, with the guidance that it should have."""
    ours = pipeline(diffusion)
    passes = []
    call = ours.unet.forward
    ours.unet.forward = lambda *args, **more: passes.append(len(args[0])) or call(*args, **more)

    def change(pipe, step, t, tensors):
        pipe._guidance_scale = then
        return tensors

    settings = {"negative_prompt": "blurred", "output_type": "latent", "guidance_scale": start}
    draw(ours, "a mug", make_features(1), "mug", callback_on_step_end=change, **settings)
    assert passes == [2 if start > 1 else 1] + [2 if then > 1 else 1] * 2
    kept = []

    def keep(pipe, step, t, tensors):
        kept.append(tensors["latents"])
        change(pipe, step, t, tensors)
        if step == 1:
            pipe._interrupt = True

    draw(ours, "a mug", callback_on_step_end=keep, **settings)
    again = []

    def replace(pipe, step, t, tensors):
        again.append(tensors["latents"])
        return {"latents": kept[0]} if step == 0 else {}

    draw(ours, "a mug", callback_on_step_end=replace, **{**settings, "guidance_scale": then})
    assert torch.equal(again[1], kept[1])


def test_embeddings_that_a_callback_changes_are_used_as_in_the_stock_pipeline(diffusion):
    ours, xl = pipeline(diffusion), len(diffusion.text_encoders) > 1
    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"] if xl else ["prompt_embeds", "negative_prompt_embeds"]

    def change(pipe, step, t, tensors):
        assert tensors.keys() == set(names) and tensors["prompt_embeds"].shape[0] == 4
        return {"prompt_embeds": tensors["prompt_embeds"] * 1.5}

    def change_in_place(pipe, step, t, tensors):
        tensors["prompt_embeds"] *= 1.5
        return {}

    settings = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names, "num_images_per_prompt": 2}
    found = draw(ours, "a mug", **settings)
    assert torch.equal(found, draw(stock(diffusion, ours), "a mug", **settings))
    assert not torch.equal(found, draw(ours, "a mug", num_images_per_prompt=2))
    assert torch.equal(found, draw(ours, "a mug", **{**settings, "callback_on_step_end": change_in_place}))
    with pytest.raises(ModelError, match="changed 'prompt_embeds', but the captions of a subject have pseudo-words"):
        draw(ours, "a mug", make_features(1), "mug", **settings)
    settings["callback_on_step_end"] = lambda *given: {"negative_prompt_embeds": torch.zeros(2, 24, 20)}
    with pytest.raises(ModelError, match="the callback changed 'negative_prompt_embeds'; it may change"):
        draw(ours, "a mug", **settings)


@pytest.mark.parametrize("returned", [None, torch.zeros(1, 4, 4, 4), [0.0]], ids=["None", "small", "list"])
def test_latents_that_a_callback_returns_keep_their_shape(tiny_sd, returned):
    settings = {"callback_on_step_end": lambda *given: {"latents": returned}}
    with pytest.raises(
        ModelError, match=r"the callback returned latents that are .*; return them in shape \(1, 4, 8, 8"
    ):
        draw(pipeline(tiny_sd), "a mug", make_features(1), "mug", **settings)


def test_callback_may_change_how_guidance_is_rescaled(tiny_sd):
    ours = pipeline(tiny_sd)

    def change(pipe, step, t, tensors):
        pipe._guidance_rescale = 0.7
        return tensors

    found = draw(ours, "a mug", callback_on_step_end=change)
    assert torch.equal(found, draw(stock(tiny_sd, ours), "a mug", callback_on_step_end=change))
    assert not torch.equal(found, draw(ours, "a mug"))
