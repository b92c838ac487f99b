"""One training step: from cached latents, features and captions to the four losses (method, sections 1 to 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import losses
from model.adapter import AdapterConfig, AdapterOutput
from model.attention import CrossAttentionContext, MapRecorder
from model.errors import ModelError
from model.prompt import TextCondition, encode_captions

if TYPE_CHECKING:
    from model.backbones.diffusion import Diffusion


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights, temperatures and variants of the losses."""

    contrastive_weight: float = 1e-2
    """Weight of CSCL + MACL [paper; what it groups is a reading]."""
    location_weight: float = 1e-3
    """Weight of the location loss [paper]."""
    cscl: bool = True
    """Use CSCL (the paper's Table 4)."""
    macl: bool = True
    """Use MACL (the paper's Table 4)."""
    cscl_temperature: float = 0.07
    """tau of CSCL; unknown in the paper."""
    macl_temperature: float = 0.5
    """tau of MACL; unknown in the paper. Its factor makes up to five of one cosine, and at 0.07 nothing else is
    heard."""
    cscl_symmetric: bool = True
    """Both directions of CSCL."""
    macl_factor: losses.Factor = "inverse"
    """a_ik; see `losses.macl`."""
    macl_similarity: losses.Similarity = "cosine"
    """Similarity inside MACL; see `losses.macl`."""
    location_side: float = 0.5
    """Largest attention map of the location loss, as a fraction of the latent's side: 32x32 of 64x64 at 512 px."""
    strength: float = 1.0
    """lambda [paper: 1]."""


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
    """M [B, C]: cosine of the subject of row i and that of sample k of the global batch (C = world * B, rank order)."""
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
    """[B] timesteps of the positives' S+; None: those of their references. With the references' own, a pair shares
    its t, and MACL can be lowered by encoding t; independent ones close that way."""


def training_losses(
    batch: TrainingBatch,
    adapter: Callable[..., AdapterOutput],
    adapter_config: AdapterConfig,
    diffusion: Diffusion,
    config: ObjectiveConfig,
) -> dict[str, Tensor]:
    """`diffusion`, `cscl`, `macl`, `location` and their weighted sum `total`, scalars in float32; a loss that is
    switched off is 0.

    Told beside them, without gradient: `sample_diffusion` [B], L_diff of each sample, and for each contrastive loss
    that is on its `cscl_accuracy` or `macl_accuracy`, see `contrastive_losses`.

    `adapter` is the Adapter or an engine around it, called once; `adapter.install(diffusion.unet)` has been called
    before. Contrastive negatives come from all ranks. Guidance dropout touches the diffusion and location losses
    only: dropped conditions are left out (the visual branch's strength is 0, the caption plain), so the model without
    subject stays the frozen base model and needs no learned null [a reading].
    """
    check_batch(batch, adapter_config, config)
    contrast = batch.positive if config.macl else None
    out = adapter(batch.reference, batch.timesteps, contrast, batch.positive_timesteps)
    parts = {
        **contrastive_losses(out, batch, config),
        **diffusion_losses(out, batch, adapter_config, diffusion, config),
    }
    parts["total"] = (
        parts["diffusion"]
        + config.contrastive_weight * (parts["cscl"] + parts["macl"])
        + config.location_weight * parts["location"]
    )
    return parts


def check_batch(batch: TrainingBatch, adapter_config: AdapterConfig, config: ObjectiveConfig) -> None:
    """Raise ModelError where the batch, the adapter and the objective do not go together."""
    if (config.cscl or config.macl) and not adapter_config.textual:
        raise ModelError("CSCL and MACL need the textual Q-Former; set cscl and macl to false, or textual to true")
    rows = batch.latents.shape[0]
    for name in ("subject_masks", "captions", "class_nouns", "reference", "positive", "similarity", "timesteps"):
        if len(getattr(batch, name)) != rows:
            raise ModelError(f"training batch: {name} has {len(getattr(batch, name))} rows and latents {rows}")


def contrastive_losses(out: AdapterOutput, batch: TrainingBatch, config: ObjectiveConfig) -> dict[str, Tensor]:
    """CSCL on the CLS tokens and MACL on S+ over the global batch, and how often each finds its positive in it.

    `cscl_accuracy`: of v among all t and, where the loss is symmetric, of t among all v, their mean. `macl_accuracy`:
    of the reference's S+ among all positives' at the same level, the mean over levels, by the similarity inside MACL
    without its factor a_ik, which depends on the pair and would tell the subjects apart by itself.
    """
    zero = out.mfi.v_cls.new_zeros((), dtype=torch.float32)
    parts = {"cscl": zero, "macl": zero}
    rows = batch.subjects.shape[0]
    offset = losses.rank_offset(rows)
    same_subject = batch.subjects[:, None] == losses.gather_rows(batch.subjects)[None, :]
    if config.cscl and out.mfi.t_cls is not None:
        v, t = out.mfi.v_cls, out.mfi.t_cls
        all_v, all_t = losses.gather_rows(v), losses.gather_rows(t)
        parts["cscl"] = losses.cscl(
            v,
            t,
            config.cscl_temperature,
            symmetric=config.cscl_symmetric,
            candidates=(all_v, all_t),
            offset=offset,
            same_subject=same_subject,
        )
        with torch.no_grad():
            pairs = [(v, all_t), (t, all_v)][: 2 if config.cscl_symmetric else 1]
            found = [losses.retrieval_accuracy(losses.cosine(a, b), offset, same_subject) for a, b in pairs]
            parts["cscl_accuracy"] = torch.stack(found).mean()
    if config.macl and out.mfi.s_plus is not None and out.positive_s_plus is not None:
        anchors = appearance_vectors(out.mfi.s_plus)
        positives = losses.gather_rows(appearance_vectors(out.positive_s_plus))
        parts["macl"] = losses.macl(
            anchors,
            positives,
            batch.similarity,
            config.macl_temperature,
            factor=config.macl_factor,
            similarity=config.macl_similarity,
            offset=offset,
            same_subject=same_subject,
        )
        with torch.no_grad():
            similarity = losses.appearance_similarity(anchors, positives, config.macl_similarity)
            parts["macl_accuracy"] = losses.retrieval_accuracy(similarity, offset, same_subject)
    return parts


def appearance_vectors(s_plus: Sequence[Tensor]) -> Tensor:
    """S+ per text encoder [B, L, n_t, d_text] -> [B, L, sum of n_t d_text], every token of length 1.

    The cosine of two such vectors is the mean of the tokens' cosines over tokens and text encoders [a reading; the
    paper's one token and one encoder leave no choice].
    """
    return torch.cat([F.normalize(s.float(), dim=-1).flatten(start_dim=2) for s in s_plus], dim=-1)


def diffusion_losses(
    out: AdapterOutput,
    batch: TrainingBatch,
    adapter_config: AdapterConfig,
    diffusion: Diffusion,
    config: ObjectiveConfig,
) -> dict[str, Tensor]:
    """L_diff, over the batch and of each sample, and the location loss of one UNet call."""
    text = batch_text(out, batch, adapter_config, diffusion)
    height, width = batch.latents.shape[-2:]
    present = (~batch.drop_image).float()
    recorder = None
    if config.location_weight > 0:
        recorder = MapRecorder(max_pixels=round(height * config.location_side) * round(width * config.location_side))
    context = CrossAttentionContext(
        text=text.hidden,
        latent_size=(height, width),
        keys=[keys[:, None] for keys in out.keys],
        values=[values[:, None] for values in out.values],
        strength=config.strength * present,
        placeholder=text.placeholder,
        recorder=recorder,
    )
    scheduler: Any = diffusion.scheduler
    schedule = scheduler.alphas_cumprod
    noisy = losses.noisy_latents(batch.latents, batch.noise, schedule, batch.timesteps)
    added = added_conditions(diffusion.unet, text, pixel_size(diffusion, noisy))
    prediction = call_unet(diffusion.unet, noisy, batch.timesteps, context, added)
    target = losses.diffusion_target(
        batch.latents, batch.noise, schedule, batch.timesteps, scheduler.config.prediction_type
    )
    with_word = present * (~batch.drop_text).float()
    return {
        "diffusion": losses.diffusion_loss(prediction, target),
        "sample_diffusion": (prediction.detach().float() - target.float()).square().flatten(start_dim=1).mean(dim=1),
        "location": location_of(recorder, batch.subject_masks, with_word, present),
    }


def batch_text(
    out: AdapterOutput, batch: TrainingBatch, adapter_config: AdapterConfig, diffusion: Diffusion
) -> TextCondition:
    """The text condition of the batch: captions with pseudo-word, plain without the image, empty without text."""
    drop_text, drop_image = batch.drop_text.tolist(), batch.drop_image.tolist()
    captions = ["" if drop else caption for caption, drop in zip(batch.captions, drop_text, strict=True)]
    s_plus = out.mfi.s_plus
    return encode_captions(
        diffusion.text_encoders,
        diffusion.tokenizers,
        captions,
        class_nouns=[[noun] for noun in batch.class_nouns],
        s_plus=None if s_plus is None else [s[:, None] for s in s_plus],
        insert=[not (text or image) for text, image in zip(drop_text, drop_image, strict=True)],
        rescale=adapter_config.rescale,
    )


def location_of(recorder: MapRecorder | None, subject_masks: Tensor, with_word: Tensor, with_image: Tensor) -> Tensor:
    """Location loss over the recorded maps -> scalar: the mean of the text maps' and the visual maps' losses.

    `with_word`, `with_image` [B] 0/1: samples that have a pseudo-word, and a visual branch. Text maps are taken as
    they are; visual maps are divided by their largest value, since as one softmax over the visual tokens their plain
    losses cancel.

    What samples add up to is divided by the mean over the ranks of how many there are, so that the mean over ranks of
    the loss and of its gradient is that of one rank with all samples.
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
            visual.append(losses.location_loss(maps.visual, subject, normalize=True))
    halves = [
        (torch.stack(rows).mean(dim=0) * weight).sum() / mean_count(weight)
        for rows, weight in ((text, with_word), (visual, with_image))
        if rows
    ]
    return torch.stack(halves).mean() if halves else zero


def mean_count(weight: Tensor) -> Tensor:
    """Sum of `weight` [B] over all ranks, at least 1, divided by their number."""
    everywhere = losses.gather_rows(weight)
    return everywhere.sum().clamp_min(1) * (len(weight) / len(everywhere))


def call_unet(
    unet: Any,
    latents: Tensor,
    timesteps: Tensor,
    context: CrossAttentionContext,
    added: dict[str, Tensor] | None,
    residuals: tuple[list[Tensor], Tensor] | None = None,
) -> Tensor:
    """The UNet's prediction [B, C, h, w] under `context`; `added` are SDXL's extra conditions, `residuals` what a
    ControlNet adds to the skip connections and the middle block."""
    down, middle = residuals or (None, None)
    return unet(
        latents.to(unet.dtype),
        timesteps,
        encoder_hidden_states=context.text[:, 0],
        added_cond_kwargs=added,
        cross_attention_kwargs={"conditioning": context},
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
        return_dict=False,
    )[0]


def added_conditions(unet: Any, text: TextCondition, size: tuple[int, int]) -> dict[str, Tensor] | None:
    """SDXL's pooled text and size conditions (original size, crop corner 0 0, target size; pixels); None for SD 1.5."""
    if unet.config.addition_embed_type != "text_time":
        return None
    if text.pooled is None:
        raise ModelError("the UNet asks for a pooled text embedding; use a base model with two text encoders")
    ids = torch.tensor([*size, 0, 0, *size], dtype=text.pooled.dtype, device=text.pooled.device)
    return {"text_embeds": text.pooled, "time_ids": ids.expand(text.pooled.shape[0], -1)}


def pixel_size(diffusion: Diffusion, latents: Tensor) -> tuple[int, int]:
    """Height and width in pixels of what `latents` decode to."""
    vae: Any = diffusion.vae
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return latents.shape[-2] * factor, latents.shape[-1] * factor
