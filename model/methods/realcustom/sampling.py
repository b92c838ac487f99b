"""Sampling of RealCustom and RealCustom++: a pass without the subject says where the subject acts in this very step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from model.attention import CrossAttentionContext, resized
from model.methods.base import Call, DenoisingState, TextModel, UNetPass
from model.methods.customcontrast.sampling import SubjectSampling
from model.methods.guidance import RealCustomGuidance
from model.methods.realcustom.masks import recorder_of, subject_mask
from model.methods.realcustom.words import phrase_marks

Projected = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Keys and values, one [images, photos, m, inner width] per cross-attention layer."""


class MaskedSampling(ABC):
    """Two UNet passes per step over the same latents.

    The text pass (T2I) reads the prompt alone; the attention of each target phrase becomes the subject's mask. The
    image pass (TI2I) adds the visual branch inside the mask, beside guidance's negative side. After the share
    `mask_steps` of the steps the last mask stays, and the text pass is left out where guidance does not need it.

    Each photo of a subject has a visual branch of its own under the subject's mask; their mean counts [a reading].
    Without references this is the base model's own sampling.
    """

    def __init__(self, adapter: Any, text_model: TextModel, unet_pass: UNetPass, call: Call) -> None:
        """`adapter`: a `model.adapter.Adapter`; the others as in `AdapterMethod.sampling`."""
        self.adapter, self.unet_pass, self.call = adapter, unet_pass, call
        self.guidance = call.guidance or RealCustomGuidance()
        self.location: Tensor | None = None
        self.plain = SubjectSampling(adapter, text_model, unet_pass, call) if call.features is None else None
        if call.features is None:
            return
        self.features, counts = call.features
        device = self.features.device
        self.owner = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))
        self.share = torch.tensor([1 / count for count in counts for _ in range(count)], device=device)
        marks = phrase_marks(text_model, call.prompts, call.prompts_2, self.guidance.words or call.nouns)
        self.marks = marks.repeat_interleave(call.images_per_prompt, dim=0).to(call.plain.hidden)
        self.mask_steps = max(1, round((self.guidance.mask_steps or 1.0) * len(call.timesteps)))

    def predict(self, step: int, t: Tensor, latents: Tensor) -> Tensor:
        """The prediction for `latents` [images, C, h, w], after guidance."""
        if self.plain is not None:
            return self.plain.predict(step, t, latents)
        masked = self.call.location_masks and step < self.mask_steps
        cascade = self.guidance.guidance == "cascade"
        of_text = self.text_pass(t, latents, masked) if masked or cascade else None
        without, of_image = self.image_pass(t, latents)
        return self.guided(without, of_text if cascade else None, of_image)

    def guided(self, without: Tensor | None, of_text: Tensor | None, of_image: Tensor) -> Tensor:
        """The predictions without prompt, with the prompt, with prompt and image, combined; `of_text` None: direct."""
        scale, call = self.call.guidance_scale, self.call
        if of_text is None:
            found = of_image if without is None else without + scale * (of_image - without)
        else:
            found = of_text if without is None else without + scale * (of_text - without)
            found = found + (self.guidance.image_scale or 0.0) * (of_image - of_text)
        return rescale_noise_cfg(found, of_image, call.guidance_rescale) if call.guidance_rescale > 0 else found

    def text_pass(self, t: Tensor, latents: Tensor, masked: bool) -> Tensor:
        """The prediction without the subject; sets the step's mask if `masked`."""
        call = self.call
        context = CrossAttentionContext(call.plain.hidden, call.size)
        if masked:
            context.placeholder, context.recorder = self.marks, recorder_of(call.size, self.guidance)
        found = self.unet_pass(latents, t, context, call.plain)
        if context.recorder is not None:
            tokens = self.marks.sum(dim=(2, 3))
            self.location = subject_mask(context.recorder, tokens, call.size, self.guidance)
        return found

    def image_pass(self, t: Tensor, latents: Tensor) -> tuple[Tensor | None, Tensor]:
        """The predictions of guidance's negative side (None without guidance) and with the subject."""
        call = self.call
        negative = call.negative if call.guided else None
        text = call.plain if negative is None else call.plain.after(negative)
        keys, values = self.project(t, latents, self.features)
        location, bare = self.photo_masks(), 0
        if negative is not None and self.guidance.negative == "black":
            black = self.project(t, latents, self.black_features())
            keys, values = (
                [torch.cat(pair) for pair in zip(*both, strict=True)]
                for both in zip(black, (keys, values), strict=True)
            )
            location = None if location is None else torch.cat([location] * 2)
        elif negative is not None:
            bare = call.images
        context = CrossAttentionContext(
            text=text.hidden,
            latent_size=call.size,
            bare=bare,
            keys=keys,
            values=values,
            strength=call.strength,
            location=location,
        )
        noise = self.unet_pass(latents if negative is None else torch.cat([latents] * 2), t, context, text)
        if negative is None:
            return None, noise
        without, of_image = noise.chunk(2)
        return without, of_image

    def photo_masks(self) -> Tensor | None:
        """[images, photos, h, w]: each photo's share of its subject's mask; None: whole, everywhere."""
        if self.location is not None and self.call.location_masks:
            return self.location.index_select(1, self.owner) * self.share[:, None, None].to(self.location)
        if len(self.owner) == len(self.call.nouns):
            return None
        return self.share[None, :, None, None].expand(self.call.images, -1, 1, 1)

    def black_features(self) -> Tensor:
        """Hidden states of a black image in place of each photo, [photos, K, N, d]."""
        assert self.call.black is not None
        return self.call.black().to(self.features).expand(len(self.features), -1, -1, -1)

    @abstractmethod
    def project(self, t: Tensor, latents: Tensor, features: Tensor) -> Projected:
        """Keys and values of features [photos, K, N, d] at this step."""


class ScoredSampling(MaskedSampling):
    """RealCustom's: the key features depend on image and step, inside the mask and by the target phrase."""

    def project(self, t: Tensor, latents: Tensor, features: Tensor) -> Projected:
        """Keys and values of the features that the scoring module chooses for each image and photo."""
        call, photos = self.call, len(features)
        each = (call.images, photos)
        text = call.plain.hidden[:, :1].expand(-1, photos, -1, -1)
        if self.guidance.text_mask:
            text = text * self.marks.sum(dim=2).index_select(1, self.owner)[..., None]
        seen = self.unet_pass.model_input(latents, t)[:, None].expand(-1, photos, -1, -1, -1)
        if self.location is not None and call.location_masks:
            mask = resized(self.location, call.size).index_select(1, self.owner)
            seen = seen * mask[:, :, None].to(seen)
        rows = call.images * photos
        state = DenoisingState(
            text=text.flatten(0, 1),
            latents=seen.flatten(0, 1),
            alphas=self.unet_pass.alpha(t).to(features.device).expand(rows),
            key_ratio=self.guidance.key_ratio or 1.0,
        )
        out = self.adapter(
            features[None].expand(call.images, -1, -1, -1, -1).flatten(0, 1), t.expand(rows), state=state
        )
        keys, values = ([part.unflatten(0, each) for part in parts] for parts in (out.keys, out.values))
        return keys, values
