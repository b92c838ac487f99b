"""Interface of a method to the adapter, the trainer and the pipeline.

A method adds something to the frozen model (`encoder`, and the visual projections of `model.adapter.Adapter`) and
defines how it is trained (`losses`) and how it samples (`sampling`). Each has its own package with a `METHOD`.

Sampling gets the latents of a step and returns the prediction, guidance included. The method decides how many UNet
passes that takes, what they read and how they are combined: its keys and values may depend on image, prompt and step,
its masks may have their own grid, and it may omit the visual branch (`keys=None`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.attention import CrossAttentionContext
from model.methods.config import AdapterConfig
from model.methods.guidance import RealCustomGuidance
from model.prompt import TextCondition, noun_ends


@dataclass(frozen=True)
class DenoisingState:
    """What an encoder may read besides the image: the denoising step its tokens are for. B rows, as the features."""

    text: Tensor
    """[B, n, d] hidden states of the caption, as the UNet reads them."""
    latents: Tensor
    """[B, C, h, w] noisy latents, as the UNet reads them."""
    alphas: Tensor
    """[B] cumulative product of the noise schedule at the timestep: 1 without noise, 0 noise alone."""
    key_ratio: float
    """Share of the image features that are kept, 0 to 1."""


@dataclass(frozen=True)
class EncoderOutput:
    """Output of an adapter's encoder for B images; from `at_timesteps`, fields marked (T,) have a T axis after B."""

    v_cls: Tensor | None
    """[B, w] visual CLS; None for a method without visual tokens."""
    v_tokens: Tensor | None
    """[B, n_v, w] visual tokens V; None for a method without."""
    t_cls: Tensor | None
    """[B, (T,) w] textual CLS; None without a textual Q-Former."""
    s_plus: tuple[Tensor, ...] | None
    """One [B, (T,) L, n_t, d_text] per text encoder, not rescaled yet; None without a textual Q-Former. L or T is 1
    where all levels or timesteps share their tokens."""
    visual_tokens: Tensor | None
    """[B, (T,) m, visual width]: V~ with TV fusion (m = L n_t), V itself without (m = n_v, no T); None for a method
    without a visual branch."""


@dataclass(frozen=True)
class AdapterOutput:
    """The adapter's output in one training step: everything the trained parameters compute."""

    mfi: EncoderOutput
    """Of the references, one timestep each."""
    positive_s_plus: tuple[Tensor, ...] | None
    """S+ of the positives, [B, L, n_t, d_text] per text encoder; None if none were given."""
    keys: tuple[Tensor, ...] | None
    """K_v = V~ W'_k per cross-attention layer, [B, m, inner width]; None without a visual branch."""
    values: tuple[Tensor, ...] | None
    """V_v = V~ W'_v per cross-attention layer, [B, m, inner width]; None without a visual branch."""


@dataclass
class Call:
    """One call of a pipeline, as seen by its method; P prompts or their embeddings, `images` = P times the images per
    prompt.

    A callback may change both guidance numbers, `plain` and `negative` between steps: a method reads them at each step.
    """

    prompts: Sequence[str]
    """[P]; empty if embeddings were given instead, and then no word can be inserted."""
    prompts_2: Sequence[str] | None
    """[P], what the second text encoder reads; None: the same."""
    nouns: tuple[str, ...]
    """Class nouns of the S subjects."""
    features: tuple[Tensor, Sequence[int]] | None
    """Hidden states [photos, K, N, d] of the references, and the number of photos per subject; None: no subject."""
    timesteps: Tensor
    """[T], of the scheduler."""
    plain: TextCondition
    """Condition of the plain prompts, one row per image."""
    negative: TextCondition | None
    """Unconditional or negative side of guidance, one row per image; None without guidance."""
    guidance_scale: float
    guidance_rescale: float
    """How far the guided prediction gets the standard deviation of the conditional one, 0 (not) to 1."""
    clip_skip: int | None
    """Number of the text encoders' last layers that the prompts skip."""
    images_per_prompt: int
    size: tuple[int, int]
    """Height and width of the latents."""
    strength: float
    """lambda, scale of the visual branch."""
    location_masks: bool
    location_start: int
    """Location masks are not used at timesteps from here up."""
    text_every: int
    """Number of consecutive steps that share S+ and captions."""
    text_batch: int
    """Captions per forward pass of a text encoder."""
    guidance: RealCustomGuidance | None = None
    """Complete, for the methods that have a default of it; None for others."""
    black: Callable[[], Tensor] | None = None
    """Computes the hidden states [1, K, N, d] of a black image: the reference of guidance's negative side, where a
    method has one."""

    @property
    def images(self) -> int:
        """Number of images sampled together."""
        return self.plain.hidden.shape[0]

    @property
    def guided(self) -> bool:
        """Whether the next step uses classifier-free guidance."""
        return self.negative is not None and self.guidance_scale > 1

    def each_image(self, text: TextCondition) -> TextCondition:
        """Rows of the prompts -> rows of the images."""
        return text.map(lambda part: part.repeat_interleave(self.images_per_prompt, dim=0))


class Sampling(Protocol):
    """A method's part of one call of a pipeline."""

    location: Tensor | None
    """[images, S, h, w] in 0..1 on a grid of its own: location of the subjects as of the last step; None if unknown."""

    def predict(self, step: int, t: Tensor, latents: Tensor) -> Tensor:
        """The prediction for `latents` [images, C, h, w] at a step, after guidance."""


class UNetPass(Protocol):
    """UNet access that a pipeline offers to a method's sampling."""

    def __call__(self, latents: Tensor, t: Tensor, context: CrossAttentionContext, text: TextCondition) -> Tensor:
        """The UNet's prediction for rows of latents under `context`; `text` is their condition, with as many rows.

        Rows beyond the number of images come first and belong to guidance's negative side.
        """

    def model_input(self, latents: Tensor, t: Tensor) -> Tensor:
        """The latents as the UNet reads them, at the scale of the training's noisy latents."""

    def alpha(self, t: Tensor) -> Tensor:
        """[1] cumulative product of the noise schedule at a timestep; ModelError for a scheduler without one."""


@dataclass(frozen=True)
class TextModel:
    """The frozen text encoders, one or two, and a tokenizer for each."""

    encoders: Sequence[Any]
    tokenizers: Sequence[Any]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the text conditions."""
        found: torch.dtype = self.encoders[-1].dtype
        return found


class Losses(Protocol):
    """Training losses of a method."""

    def __call__(
        self, batch: Any, adapter: Callable[..., Any], adapter_config: AdapterConfig, diffusion: Any, config: Any
    ) -> dict[str, Tensor]:
        """`total` and its parts, scalars, and `sample_diffusion` [B]; see `model.objective`."""


@dataclass(frozen=True)
class AdapterMethod:
    """A customization method."""

    name: str
    """As in `model.encoder` of params.yaml and `encoder` of adapter.json."""
    check: Callable[[AdapterConfig], None]
    """Raises ModelError if a config does not fit the method."""
    encoder: Callable[[AdapterConfig], nn.Module]
    """The module between image features and tokens, with new weights; all of it is trained."""
    losses: Losses
    sampling: Callable[[Any, TextModel, UNetPass, Call], Sampling]
    """Creates the sampling of a call from the adapter, the text model and the pipeline's UNet."""
    reads_prompt: Callable[[AdapterConfig], bool] = lambda config: config.textual
    """Whether sampling with a subject needs its words in the prompt, and so the prompt as text."""
    require_words: Callable[[str, Sequence[str]], Any] = noun_ends
    """Raises ModelError if a prompt lacks one of these words: the class nouns, or the target phrases of `guidance`."""
    guidance: RealCustomGuidance | None = None
    """Default of a call's `guidance`; None: the method takes none."""
    drops_to_black: bool = False
    """Whether training reads `TrainingBatch.black` where a reference is dropped."""
    visual: bool = True
    """Whether it has a visual branch, and so K' and V'."""
    positives: bool = True
    """Whether training reads `TrainingBatch.positive`; else the references stand in for them."""
    scales_features: bool = False
    """Whether the visual tokens are the image features and have their width; else they have that of the UNet's text."""


def stacked_means(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Mean of each subject's rows: [sum of counts, ...] -> [subjects, ...]."""
    return torch.stack([part.mean(dim=0) for part in rows.split(list(counts))])
