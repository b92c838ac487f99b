"""Sampling with pseudo-words, a visual branch and location masks (method, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from model.attention import CrossAttentionContext, MapRecorder
from model.location import location_map
from model.methods.base import Call, TextModel, UNetPass, stacked_means
from model.prompt import TextCondition, encode_captions


@dataclass(frozen=True)
class SubjectTokens:
    """The encoder's output for S subjects at T timesteps, computed before sampling starts."""

    s_plus: tuple[Tensor, ...] | None
    """One [S, T, L, n_t, d_text] per text encoder; None without a textual Q-Former."""
    visual_tokens: Tensor | None
    """[S, T, m, visual width]; T is 1 without TV fusion, where they are the same at every timestep. None without a
    visual branch."""

    def visual_at(self, step: int) -> Tensor | None:
        """[S, m, visual width] at a step."""
        if self.visual_tokens is None:
            return None
        return self.visual_tokens[:, step if self.visual_tokens.shape[1] > 1 else 0]


class SubjectSampling:
    """One guided UNet pass per step, conditioned on the step's S+ and visual tokens.

    Everything that depends only on the references is computed before the first step. Without references this is the
    base model's own sampling.
    """

    def __init__(self, adapter: Any, text_model: TextModel, unet_pass: UNetPass, call: Call) -> None:
        """`adapter`: a `model.adapter.Adapter`; the others as in `AdapterMethod.sampling`."""
        self.adapter, self.text_model, self.unet_pass, self.call = adapter, text_model, unet_pass, call
        self.tokens = None
        if call.features is not None:
            self.tokens = subject_tokens(adapter, *call.features, call.timesteps[:: call.text_every])
        self.location: Tensor | None = None
        self.texts: list[TextCondition] = []
        """Conditions with pseudo-words, of the steps whose captions were encoded together."""

    def predict(self, step: int, t: Tensor, latents: Tensor) -> Tensor:
        """The prediction for `latents` [images, C, h, w], after guidance."""
        call = self.call
        text = self.text_at(step)
        negative = call.negative if call.guided else None
        if negative is not None:
            text = text.after(negative)
        context = self.condition(text, step, self.location if t < call.location_start else None)
        context.recorder = self.recorder(step)
        rows = latents if negative is None else torch.cat([latents] * 2)
        noise = self.unet_pass(rows, t, context, text)
        if context.recorder is not None:
            self.location = location_map(context.recorder.maps.values(), call.size)
        if negative is None:
            return noise
        without, with_text = noise.chunk(2)
        guided = without + call.guidance_scale * (with_text - without)
        return rescale_noise_cfg(guided, with_text, call.guidance_rescale) if call.guidance_rescale > 0 else guided

    def text_at(self, step: int) -> TextCondition:
        """The images' condition at a step, with pseudo-words if there are any."""
        call = self.call
        if self.tokens is None or self.tokens.s_plus is None:
            return call.plain
        chunk = max(1, call.text_batch // (len(call.prompts) * self.adapter.config.level_count))
        place = step // call.text_every
        if step % (chunk * call.text_every) == 0:
            count = self.tokens.s_plus[0].shape[1]
            self.texts = self.encode_pseudo_words(self.tokens.s_plus, range(place, min(place + chunk, count)))
        return call.each_image(self.texts[place % chunk])

    def recorder(self, step: int) -> MapRecorder | None:
        """Recorder of a step's maps, or None if the next step does not use them."""
        call = self.call
        if self.tokens is None or not call.location_masks or step + 1 >= len(call.timesteps):
            return None
        height, width = call.size
        return MapRecorder(height * width) if call.timesteps[step + 1] < call.location_start else None

    def encode_pseudo_words(self, s_plus: Sequence[Tensor], steps: Sequence[int]) -> list[TextCondition]:
        """The prompts with pseudo-words, L captions each, for several steps in one batch -> one condition per step."""
        prompts = list(self.call.prompts)
        span = slice(steps[0], steps[-1] + 1)
        every = encode_captions(
            self.text_model.encoders,
            self.text_model.tokenizers,
            prompts * len(steps),
            captions_2=None if self.call.prompts_2 is None else list(self.call.prompts_2) * len(steps),
            clip_skip=self.call.clip_skip,
            class_nouns=[self.call.nouns] * (len(prompts) * len(steps)),
            s_plus=[s[:, span].transpose(0, 1).repeat_interleave(len(prompts), dim=0) for s in s_plus],
            **self.adapter.config.writing,
        )
        return [
            TextCondition(hidden, pooled, placeholder)
            for hidden, pooled, placeholder in zip(
                every.hidden.split(len(prompts)),
                [None] * len(steps) if every.pooled is None else every.pooled.split(len(prompts)),
                [None] * len(steps) if every.placeholder is None else every.placeholder.split(len(prompts)),
                strict=True,
            )
        ]

    def condition(self, text: TextCondition, step: int, location: Tensor | None) -> CrossAttentionContext:
        """The context of a pass; its unconditional rows (the first half under guidance) have no subject."""
        call = self.call
        if self.tokens is None:
            return CrossAttentionContext(text.hidden, call.size)
        tokens, keys, values = self.tokens.visual_at(step // call.text_every), None, None
        if tokens is not None:
            keys, values = (
                [projected[None].expand(call.images, -1, -1, -1) for projected in part]
                for part in self.adapter.project(tokens)
            )
        return CrossAttentionContext(
            text=text.hidden,
            latent_size=call.size,
            bare=text.hidden.shape[0] - call.images,
            keys=keys,
            values=values,
            strength=call.strength,
            placeholder=None if text.placeholder is None else text.placeholder[-call.images :],
            location=location,
            levels=self.adapter.config.levels,
        )


def subject_tokens(adapter: Any, features: Tensor, counts: Sequence[int], timesteps: Tensor) -> SubjectTokens:
    """Features [photos, K, N, d] of subjects with `counts` photos each -> S+ and visual tokens of timesteps [T].

    The tokens of several photos are averaged [a reading].
    """
    out = adapter.mfi.at_timesteps(features, timesteps.to(features.device))
    s_plus = None if out.s_plus is None else tuple(stacked_means(s, counts) for s in out.s_plus)
    if out.visual_tokens is None:
        return SubjectTokens(s_plus, None)
    tokens = out.visual_tokens if out.visual_tokens.ndim == 4 else out.visual_tokens[:, None]
    return SubjectTokens(s_plus, stacked_means(tokens, counts))
