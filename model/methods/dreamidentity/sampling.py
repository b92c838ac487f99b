"""Sampling of DreamIdentity: captions with S*, encoded once, and the base model's own passes."""

from __future__ import annotations

from typing import Any

from model.methods.base import Call, TextModel, UNetPass
from model.methods.customcontrast.sampling import SubjectSampling
from model.prompt import TextCondition


class WordSampling(SubjectSampling):
    """As `SubjectSampling` with one caption for all steps; S* has no location map, as training made none."""

    def __init__(self, adapter: Any, text_model: TextModel, unet_pass: UNetPass, call: Call) -> None:
        super().__init__(adapter, text_model, unet_pass, call)
        self.first = round(adapter.config.words.start * len(call.timesteps))
        """The step from which on S* is read; the ones before read the class noun alone."""

    def text_at(self, step: int) -> TextCondition:
        """The images' condition at a step."""
        if self.tokens is None or self.tokens.s_plus is None or step < self.first:
            return self.call.plain
        if not self.texts:
            self.texts = self.encode_pseudo_words(self.tokens.s_plus, [0])
        return self.call.each_image(self.texts[0])

    def recorder(self, step: int) -> None:
        """None: no maps are recorded."""
        return None
