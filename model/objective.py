"""The parts of a training step shared by all methods: batch, L_diff and location loss (method, sections 1 to 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import losses
from model.attention import CrossAttentionContext, MapRecorder
from model.methods.base import AdapterOutput
from model.methods.config import AdapterConfig
from model.prompt import TextCondition, encode_captions
from model.unet import added_conditions, call_unet, uncropped
from runtime.errors import ModelError

if TYPE_CHECKING:
    from model.backbones.diffusion import Diffusion


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights, temperatures and variants of the losses."""

    contrastive_weight: float = 1e-2
    """Weight of CSCL + MACL [paper; the grouping is a reading]."""
    location_weight: float = 1e-3
    """Weight of the location loss [paper]."""
    cscl: bool = True
    """Use CSCL (the paper's Table 4)."""
    macl: bool = True
    """Use MACL (the paper's Table 4)."""
    cscl_temperature: float = 0.07
    """tau of CSCL; not given in the paper."""
    macl_temperature: float = 0.5
    """tau of MACL; not given in the paper. Its factor scales a cosine up to five times, and at 0.07 it swamps the other
    losses."""
    cscl_symmetric: bool = True
    """Both directions of CSCL."""
    macl_factor: losses.Factor = "inverse"
    """a_ik; see `losses.macl`."""
    macl_similarity: losses.Similarity = "cosine"
    """Similarity inside MACL; see `losses.macl`."""
    location_side: float = 0.5
    """Largest attention map of the location loss, as a fraction of the latent's side: 32x32 of 64x64 at 512 px."""
    location_scale: losses.MapScale = "peak"
    """What each visual map is divided by; see `losses.location_loss` [a reading]."""
    strength: float = 1.0
    """lambda [paper: 1]."""
    regularisation_weight: float = 1e-4
    """Weight of the mean squared length of DreamIdentity's words [a reading]."""


@dataclass
class TrainingBatch:
    """B samples of this rank. Tensors are on the device of the UNet."""

    latents: Tensor
    """[B, C, h, w] latents of the targets, already multiplied by the VAE's scaling factor."""
    subject_masks: Tensor
    """[B, h, w] in 0..1: the subject in the target, 1 where all of it is subject."""
    captions: Sequence[str]
    """B captions of the targets; each contains its class noun as whole words."""
    class_nouns: Sequence[str]
    """B class nouns."""
    reference: Tensor
    """[B, K, N, d] image-encoder hidden states of the references."""
    positive: Tensor
    """[B, K, N, d] of the positives."""
    similarity: Tensor
    """M [B, C]: cosine of row i's subject and that of sample k of the global batch (C = world * B, rank order)."""
    subjects: Tensor
    """[B] integer, equal for equal subjects, over all ranks."""
    timesteps: Tensor
    """[B] integers, 0..num_train_timesteps - 1."""
    noise: Tensor
    """[B, C, h, w] standard normal."""
    drop_image: Tensor
    """[B] bool: no subject, neither visual branch nor pseudo-word."""
    drop_text: Tensor
    """[B] bool: empty caption. With drop_image too, the sample is unconditional."""
    positive_timesteps: Tensor | None = None
    """[B] timesteps of the positives' S+; None: those of their references. A pair then shares its t, and MACL can
    be lowered by encoding t; independent timesteps prevent that."""
    key_ratio: float = 1.0
    """Share of a reference's features that RealCustom keeps in this step, 0 to 1: one for all samples and ranks."""
    black: Tensor | None = None
    """[1, K, N, d] hidden states of a black image, which RealCustom++ reads where the reference is dropped."""


def check_batch(batch: TrainingBatch, adapter_config: AdapterConfig, config: ObjectiveConfig) -> None:
    """Raise ModelError if the batch, the adapter and the objective are inconsistent."""
    if (config.cscl or config.macl) and not adapter_config.textual:
        raise ModelError("CSCL and MACL need the textual Q-Former; set cscl and macl to false, or textual to true")
    rows = batch.latents.shape[0]
    for name in ("subject_masks", "captions", "class_nouns", "reference", "positive", "similarity", "timesteps"):
        if len(getattr(batch, name)) != rows:
            raise ModelError(f"training batch: {name} has {len(getattr(batch, name))} rows, but latents has {rows}")


def diffusion_losses(
    out: AdapterOutput,
    batch: TrainingBatch,
    adapter_config: AdapterConfig,
    diffusion: Diffusion,
    config: ObjectiveConfig,
    text: TextCondition | None = None,
) -> dict[str, Tensor]:
    """L_diff, over the batch and per sample, and the location loss, from one UNet call. `text`: that of `batch_text`,
    where it is known already."""
    if text is None:
        text = batch_text(out.mfi.s_plus, batch, adapter_config, diffusion)
    height, width = batch.latents.shape[-2:]
    present = (~batch.drop_image).float()
    recorder = None
    if config.location_weight > 0:
        recorder = MapRecorder(max_pixels=round(height * config.location_side) * round(width * config.location_side))
    context = CrossAttentionContext(
        text=text.hidden,
        latent_size=(height, width),
        keys=None if out.keys is None else [keys[:, None] for keys in out.keys],
        values=None if out.values is None else [values[:, None] for values in out.values],
        strength=config.strength * present,
        placeholder=text.placeholder,
        recorder=recorder,
        levels=adapter_config.levels,
    )
    scheduler: Any = diffusion.scheduler
    schedule = scheduler.alphas_cumprod
    noisy = losses.noisy_latents(batch.latents, batch.noise, schedule, batch.timesteps)
    added = added_conditions(diffusion.unet, text, uncropped(diffusion, noisy))
    prediction = call_unet(diffusion.unet, noisy, batch.timesteps, context, added)
    target = losses.diffusion_target(
        batch.latents, batch.noise, schedule, batch.timesteps, scheduler.config.prediction_type
    )
    with_word = present * (~batch.drop_text).float()
    return {
        "diffusion": losses.diffusion_loss(prediction, target),
        "sample_diffusion": (prediction.detach().float() - target.float()).square().flatten(start_dim=1).mean(dim=1),
        "location": location_of(recorder, batch.subject_masks, with_word, present, config.location_scale),
    }


def batch_text(
    s_plus: tuple[Tensor, ...] | None, batch: TrainingBatch, adapter_config: AdapterConfig, diffusion: Diffusion
) -> TextCondition:
    """The text condition of the batch: captions with pseudo-word (`s_plus` of `EncoderOutput`), plain without image or
    `s_plus`, empty without text."""
    drop_text, drop_image = batch.drop_text.tolist(), batch.drop_image.tolist()
    captions = ["" if drop else caption for caption, drop in zip(batch.captions, drop_text, strict=True)]
    return encode_captions(
        diffusion.text_encoders,
        diffusion.tokenizers,
        captions,
        class_nouns=[[noun] for noun in batch.class_nouns],
        s_plus=None if s_plus is None else [s[:, None] for s in s_plus],
        insert=[not (text or image) for text, image in zip(drop_text, drop_image, strict=True)],
        **adapter_config.writing,
    )


def location_of(
    recorder: MapRecorder | None,
    subject_masks: Tensor,
    with_word: Tensor,
    with_image: Tensor,
    scale: losses.MapScale = "peak",
) -> Tensor:
    """Location loss over the recorded maps -> scalar: the mean of the text maps' and the visual maps' losses.

    `with_word`, `with_image` [B] 0/1: samples with a pseudo-word, and with a visual branch. Text maps are used as
    they are; visual maps are divided as `scale` says, since as one softmax over the visual tokens their plain losses
    cancel.

    The sum over samples is divided by their mean number per rank, so that the mean over ranks of the loss and of its
    gradient is that of one rank with all samples.
    """
    zero = subject_masks.new_zeros((), dtype=torch.float32)
    if recorder is None:
        return zero
    if not recorder.maps:
        raise ModelError("no cross-attention map is small enough for the location loss; raise location_side")
    text, visual = [], []
    for maps in recorder.maps.values():
        found = maps.text if maps.text is not None else maps.visual
        if found is None:
            continue
        subject = F.adaptive_avg_pool2d(subject_masks[:, None].float(), (found.shape[-2], found.shape[-1]))[:, 0]
        if maps.text is not None:
            text.append(losses.location_loss(maps.text, subject))
        if maps.visual is not None:
            visual.append(losses.location_loss(maps.visual, subject, scale))
    halves = [
        (torch.stack(rows).mean(dim=0) * weight).sum() / mean_count(weight)
        for rows, weight in ((text, with_word), (visual, with_image))
        if rows
    ]
    return torch.stack(halves).mean() if halves else zero


def mean_count(weight: Tensor) -> Tensor:
    """Sum of `weight` [B] over all ranks, at least 1, divided by the number of ranks."""
    everywhere = losses.gather_rows(weight)
    return everywhere.sum().clamp_min(1) * (len(weight) / len(everywhere))
