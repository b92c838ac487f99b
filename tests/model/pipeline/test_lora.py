"""LoRA beside the adapter, loaded and scaled as in diffusers."""

from __future__ import annotations

import pytest
import torch

from runtime.errors import ModelError
from tests.world.lora import load_lora
from tests.world.models import TinyDiffusion, make_features
from tests.world.pipelines import draw, pipeline, stock


def scalings(diffusion: TinyDiffusion) -> list[dict[str, float]]:
    return [
        dict(layer.scaling)
        for model in (diffusion.unet, *diffusion.text_encoders)
        for layer in model.modules()
        if hasattr(layer, "scale_layer")
    ]


def test_lora_goes_beside_the_adapter(diffusion, tmp_path):
    ours = pipeline(diffusion)
    plain = draw(ours, "a mug on ice", make_features(1), "mug")
    load_lora(ours, diffusion, tmp_path, "style")
    made = draw(ours, "a mug on ice", make_features(1), "mug")
    assert not torch.equal(made, plain)
    built = stock(diffusion, ours)
    assert torch.equal(draw(ours, "a mug", make_features(1), "mug", subject_strength=0.0), draw(built, "a mug"))
    ours.set_adapters("style", 0.0)
    torch.testing.assert_close(draw(ours, "a mug on ice", make_features(1), "mug"), plain)
    ours.unload_lora_weights()
    assert torch.equal(draw(ours, "a mug on ice", make_features(1), "mug"), plain)


@pytest.mark.parametrize("scale", [0.3, 0.0, 1.0, 2, -0.5])
def test_lora_scale_of_a_call_is_that_of_the_stock_pipeline(diffusion, tmp_path, scale):
    ours = pipeline(diffusion)
    load_lora(ours, diffusion, tmp_path, "style")
    ours.set_adapters("style", 0.8)
    kept, built = scalings(diffusion), stock(diffusion, ours)
    assert kept and all(found["style"] == 0.8 for found in kept)
    settings = {"cross_attention_kwargs": {"scale": scale}, "negative_prompt": "blurred"}
    found = draw(ours, "a mug", make_features(1), "mug", subject_strength=0.0, **settings)
    assert scalings(diffusion) == kept and ours.cross_attention_kwargs == {"scale": scale}
    assert torch.equal(found, draw(built, "a mug", **settings))
    ours.set_adapters("style", 0.8)  # which diffusers forgets after a scale of 0
    assert torch.equal(found, draw(ours, "a mug", negative_prompt="blurred")) == (scale == 1)
    shown = draw(ours, "a mug", make_features(1), "mug", **settings)
    ours.set_adapters("style", 0.8 * scale)
    expected = draw(ours, "a mug", make_features(1), "mug", negative_prompt="blurred")
    torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-5)


def test_lora_scale_is_restored_after_an_error(diffusion, tmp_path):
    ours = pipeline(diffusion)
    load_lora(ours, diffusion, tmp_path, "style")
    ours.load_lora_weights(tmp_path, adapter_name="other")
    ours.set_adapters(["style", "other"], [0.7, 0.2])
    kept, seen = scalings(diffusion), []

    def fail(pipe, step, t, tensors):
        seen.append(scalings(diffusion))
        raise RuntimeError("stopped")

    settings = {"cross_attention_kwargs": {"scale": 0.5}, "callback_on_step_end": fail}
    with pytest.raises(RuntimeError, match="stopped"):
        draw(ours, "a mug", make_features(1), "mug", **settings)
    assert scalings(diffusion) == kept
    assert seen == [[{name: value * 0.5 for name, value in found.items()} for found in kept]]
    with pytest.raises(ModelError, match="cross_attention_kwargs has 'conditioning'; only 'scale'"):
        draw(ours, "a mug", cross_attention_kwargs={"scale": 0.5, "conditioning": None})
    assert scalings(diffusion) == kept


def test_weights_that_a_callback_sets_stay(tiny_sd, tmp_path):
    ours = pipeline(tiny_sd)
    load_lora(ours, tiny_sd, tmp_path, "style")
    settings = {"callback_on_step_end": lambda pipe, *given: pipe.set_adapters("style", 0.4) or {}}
    draw(ours, "a mug", make_features(1), "mug", **settings)
    assert all(found["style"] == 0.4 for found in scalings(tiny_sd))


def test_scale_without_a_lora_changes_nothing(tiny_sd):
    ours = pipeline(tiny_sd)
    settings = {"cross_attention_kwargs": {"scale": 0.5}}
    assert torch.equal(draw(ours, "a mug", **settings), draw(ours, "a mug"))
    assert torch.equal(draw(ours, "a mug", cross_attention_kwargs={}), draw(ours, "a mug"))
