"""RealCustom and RealCustom++ around tiny models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from model.pipeline import CustomContrastPipeline
from tests.world import models
from tests.world.models import FakeClip, TinyDiffusion, make_adapter
from tests.world.pipelines import pipeline

METHODS = ("realcustom", "realcustom_pp")
VIEWS = (0, 1, 2, 3, 4)
"""Of two towers; RealCustom takes them for layers."""
SIZES: dict[str, Any] = {"textual": False, "tv_fusion": False, "feature_layers": VIEWS, "projector": {"head": 8}}


def make_features(batch: int, seed: int = 2) -> Tensor:
    return models.make_features(batch, seed, len(VIEWS))


class BlackClip(FakeClip):
    """Sees something else in a black image than in the references of `make_features`."""

    def hidden_states(self, images, layers):
        self.seen.append((images, layers))
        return make_features(len(images), seed=9)


def build(diffusion: TinyDiffusion, method: str, **sizes: Any) -> CustomContrastPipeline:
    return pipeline(diffusion, BlackClip(), encoder=method, **{**SIZES, **sizes})


def adapter_of(diffusion: TinyDiffusion, method: str, **sizes: Any) -> Any:
    return make_adapter(diffusion, encoder=method, **{**SIZES, **sizes})
