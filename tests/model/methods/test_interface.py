"""What a method may do: passes of its own, keys by step and image, no visual branch; the pipeline follows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.attention import CrossAttentionContext
from model.methods import customcontrast
from model.methods.config import AdapterConfig
from model.methods.registry import METHODS, method_of
from model.pipeline import build_pipeline
from runtime.errors import ModelError
from tests.world.models import make_adapter, make_features


class TwoPasses:
    """Reads the same latents without and with a visual branch whose keys depend on them, and takes the mean."""

    location = None

    def __init__(self, adapter, text_model, unet_pass, call) -> None:
        self.adapter, self.unet_pass, self.call, self.rows = adapter, unet_pass, call, 0

    def predict(self, step, t, latents):
        text = self.call.plain
        found = []
        for visual in (False, True):
            context = CrossAttentionContext(text.hidden, self.call.size)
            if visual:
                width = self.adapter.config.visual_width
                tokens = latents.mean(dim=(1, 2, 3))[:, None, None] + torch.ones(len(latents), 2, width) * (step + 1)
                keys, values = self.adapter.project(tokens)
                context = replace(context, keys=[k[:, None] for k in keys], values=[v[:, None] for v in values])
            found.append(self.unet_pass(latents, t, context, text))
            self.rows += len(latents)
        return torch.stack(found).mean(dim=0)


@pytest.fixture
def two_passes(monkeypatch) -> list[TwoPasses]:
    """A method of another name, registered; gives the samplings that were made."""
    made: list[TwoPasses] = []

    def sampling(*parts):
        made.append(TwoPasses(*parts))
        return made[-1]

    monkeypatch.setitem(METHODS, "two_passes", replace(customcontrast.METHOD, name="two_passes", sampling=sampling))
    return made


def draw(pipeline, features, **settings):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "guidance_scale": 1, "output_type": "latent", "generator": generator}
    return pipeline("a mug", features, "mug", **options | settings).images


def test_a_method_combines_as_many_passes_as_it_wants(tiny_sd, two_passes):
    adapter = make_adapter(tiny_sd, encoder="two_passes")
    pipeline = build_pipeline(tiny_sd, adapter)
    pipeline.set_progress_bar_config(disable=True)
    image = draw(pipeline, make_features(1))
    assert two_passes[0].rows == 2 * 3 and torch.isfinite(image).all()
    other = build_pipeline(tiny_sd, make_adapter(tiny_sd))
    other.set_progress_bar_config(disable=True)
    assert not torch.equal(image, draw(other, make_features(1)))


def test_every_method_is_found_by_the_name_in_the_config(tiny_sd):
    config = make_adapter(tiny_sd).config
    assert (
        set(METHODS) == {"mfi", "ip_adapter_plus", "realcustom", "realcustom_pp", "dreamidentity"}
        and method_of(config).name == config.encoder
    )
    plain = replace(config, encoder="ip_adapter_plus", textual=False, tv_fusion=False)
    assert type(method_of(plain).encoder(plain)).__name__ == "IPAdapterPlusEncoder"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder": "mlp"}, "encoder is 'mlp'; use mfi, ip_adapter_plus, realcustom, realcustom_pp or dreamidentity"),
        ({"encoder": "ip_adapter_plus"}, "ip_adapter_plus has no textual Q-Former"),
        ({"textual": False}, "tv_fusion needs the textual Q-Former"),
        ({"visual_scope": "mine"}, "visual_scope is 'mine'"),
        ({"visual_scope": "own", "tv_fusion": False}, "only refined visual tokens belong to a layer"),
    ],
)
def test_config_that_does_not_fit_a_method_is_one_sentence(tiny_sd, changes, said):
    config: AdapterConfig = replace(make_adapter(tiny_sd).config, **changes)
    with pytest.raises(ModelError, match=said):
        method_of(config)
