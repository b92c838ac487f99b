"""The pipelines' call beside diffusers': the same names, defaults and properties; docs/model.md lists the rest."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)

from model.pipeline import CustomContrastPipeline, CustomContrastXLPipeline

DOC = Path(__file__).parents[3] / "docs" / "model.md"
OWN = {
    *("references", "class_nouns", "subjects", "subject_strength", "location_masks", "location_start"),
    *("text_every", "text_batch", "control_image", "guidance"),
}
OF_SOME = {
    *("guidance_rescale", "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"),
    *("guess_mode", "prompt_2", "negative_prompt_2", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    *("original_size", "crops_coords_top_left", "target_size"),
    *("negative_original_size", "negative_crops_coords_top_left", "negative_target_size"),
}
"""Arguments that not each of diffusers' pipelines has."""
PAIRS = [
    (StableDiffusionPipeline, CustomContrastPipeline),
    (StableDiffusionXLPipeline, CustomContrastXLPipeline),
    (StableDiffusionControlNetPipeline, CustomContrastPipeline),
    (StableDiffusionXLControlNetPipeline, CustomContrastXLPipeline),
]


def arguments(kind: Any) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(kind.__call__).parameters)
    return {name: parameter for name, parameter in found.items() if name not in ("self", "kwargs")}


def missing() -> set[str]:
    """The names in the first column of the section's table."""
    section = (
        DOC.read_text(encoding="utf-8").split("## What diffusers' pipelines have and these do not")[1].split("## ")[0]
    )
    return {name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}


def test_every_missing_argument_is_listed():
    assert {name for stock, ours in PAIRS for name in arguments(stock).keys() - arguments(ours).keys()} == missing()


@pytest.mark.parametrize(("stock", "ours"), PAIRS)
def test_arguments_in_common_have_the_same_defaults(stock, ours):
    theirs, found = arguments(stock), arguments(ours)
    assert found.keys() - theirs.keys() <= OWN | OF_SOME
    common = theirs.keys() & found.keys()
    differ = {name for name in common if theirs[name].default != found[name].default}
    xl = {"guidance_scale"} if ours is CustomContrastXLPipeline else set()
    assert differ == {"callback_on_step_end_tensor_inputs"} | xl
    by_place = [name for name, parameter in found.items() if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert by_place == ["prompt", "references", "class_nouns"]


def test_every_argument_is_one_of_diffusers_or_listed_as_our_own():
    assert {name for stock, _ in PAIRS for name in arguments(stock)} >= OF_SOME
    for stock, ours in PAIRS:
        assert arguments(ours).keys() >= OWN and not OWN & arguments(stock).keys()


@pytest.mark.parametrize(("stock", "ours"), PAIRS)
def test_properties_of_a_call_are_those_of_diffusers(stock, ours):
    def properties(kind: Any) -> set[str]:
        return {name for name in dir(kind) if name[0] != "_" and isinstance(getattr(kind, name, None), property)}

    assert properties(stock) - properties(ours) <= missing()
    for name in ("interrupt", "num_timesteps", "guidance_scale", "do_classifier_free_guidance"):
        assert name in properties(ours)


@pytest.mark.parametrize(("stock", "ours"), PAIRS)
def test_callbacks_may_ask_for_what_diffusers_gives(stock, ours):
    assert set(stock._callback_tensor_inputs) <= set(ours._callback_tensor_inputs)
