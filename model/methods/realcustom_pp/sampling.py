"""Sampling of RealCustom++: tokens that depend on the references alone, computed once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from model.methods.base import Call, TextModel, UNetPass
from model.methods.realcustom.sampling import MaskedSampling, Projected


class ProjectedSampling(MaskedSampling):
    """As `MaskedSampling`; keys and values of references and of the black image are projected once."""

    def __init__(self, adapter: Any, text_model: TextModel, unet_pass: UNetPass, call: Call) -> None:
        super().__init__(adapter, text_model, unet_pass, call)
        self.known: dict[bool, Projected] = {}

    def project(self, t: Tensor, latents: Tensor, features: Tensor) -> Projected:
        """Keys and values of the features, the same at every step and for every image."""
        own = features is self.features
        if own not in self.known:
            out = self.adapter(features, t.expand(len(features)))
            self.known[own] = out.keys, out.values
        keys, values = (
            [part[None].expand(self.call.images, -1, -1, -1) for part in parts] for parts in self.known[own]
        )
        return keys, values
