"""ControlNets beside the adapter."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import ControlNetModel

from model.pipeline import build_pipeline
from runtime.errors import ModelError
from tests.world.models import make_adapter, make_features
from tests.world.pipelines import draw, stock


def test_controlnet_goes_beside_the_adapter(diffusion):
    built = build_pipeline(diffusion, make_adapter(diffusion))
    torch.manual_seed(5)
    controlnet: Any = ControlNetModel.from_unet(
        diffusion.unet, conditioning_channels=3, conditioning_embedding_out_channels=(4, 8)
    ).eval()
    for parameter in controlnet.parameters():
        if not parameter.any():  # its outputs start from zero
            torch.nn.init.normal_(parameter, std=0.1)
    xl = len(diffusion.text_encoders) > 1
    kind: Any = diffusers.StableDiffusionXLControlNetPipeline if xl else diffusers.StableDiffusionControlNetPipeline
    loaded = stock(diffusion, built)
    parts = {name: part for name, part in loaded.components.items() if part is not None}
    more = {"add_watermarker": False} if xl else {"safety_checker": None, "feature_extractor": None}
    controlled = kind(**{**parts, **more}, controlnet=controlnet)
    ours = type(built).from_pipe(controlled, make_adapter(diffusion))
    for one in (ours, controlled):
        one.set_progress_bar_config(disable=True)
    edges = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"controlnet_conditioning_scale": 0.7, "num_images_per_prompt": 2}
    expected = draw(controlled, "a mug on ice", image=edges, **settings)
    assert torch.equal(draw(ours, "a mug on ice", control_image=edges, **settings), expected)
    shown = draw(ours, "a mug on ice", make_features(1), "mug", control_image=edges, **settings)
    assert torch.isfinite(shown).all() and not torch.equal(shown, expected)
    with pytest.raises(ModelError, match="give both or neither"):
        draw(ours, "a mug on ice")
    prompts = ["a mug on ice", "a photo of a mug"]
    several = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for given in (edges, several, [*several]):  # one for all, one per prompt
        expected = draw(controlled, prompts, image=given, **settings)
        assert torch.equal(draw(ours, prompts, control_image=given, **settings), expected)
    for wrong, message in (
        (edges.repeat(3, 1, 1, 1), "3 control images for 2 prompts; give one, or one per prompt"),
        (edges.repeat(4, 1, 1, 1), "4 control images for 2 prompts"),
        ([], "control_image cannot be read"),
        ("edges.png", "control_image cannot be read"),
        (edges[:, :1], "control_image has 1 channels, but the ControlNet reads 3"),
        (edges * 255, "control_image has values that are not in 0..1"),
        (edges * torch.nan, "control_image has values that are not in 0..1"),
    ):
        with pytest.raises(ModelError, match=message):
            draw(ours, prompts, control_image=wrong, **settings)
    with pytest.raises(ModelError, match="several ControlNets, but it takes one"):
        type(built).from_pipe(kind(**{**parts, **more}, controlnet=[controlnet, controlnet]), make_adapter(diffusion))
