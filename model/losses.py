"""The four training losses as pure functions of tensors (method, section 3; the paper's equations 1, 4, 7 and 8)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from runtime.errors import ModelError

Factor = Literal["inverse", "none", "two_minus", "soft_target"]
Similarity = Literal["cosine", "shifted"]
MapScale = Literal["peak", "means"]

SIMILARITY_FLOOR = 0.2
"""Lower clamp of real similarities in `factor: inverse`, which keeps the factor at 5 or less."""


def noisy_latents(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """z_t = sqrt(a_t) z + sqrt(1 - a_t) noise: latents, noise [B, C, h, w], timesteps int [B], alphas_cumprod
    [1000]."""
    signal, spread = _schedule(alphas_cumprod, timesteps, latents)
    return signal * latents + spread * noise


def diffusion_target(
    latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, prediction_type: str
) -> Tensor:
    """Regression target of the UNet, [B, C, h, w]: the noise (`epsilon`), v = sqrt(a_t) noise - sqrt(1 - a_t) z
    (`v_prediction`) or z itself (`sample`), as set by the base model's scheduler."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    if prediction_type == "v_prediction":
        signal, spread = _schedule(alphas_cumprod, timesteps, latents)
        return signal * noise - spread * latents
    raise ModelError(
        f"the scheduler's prediction_type is '{prediction_type}'; use a base model with epsilon, v_prediction or sample"
    )


def diffusion_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L_diff: mean squared error in float32, both [B, C, h, w] -> scalar (equation 1)."""
    return F.mse_loss(prediction.float(), target.float())


def cscl(
    v: Tensor,
    t: Tensor,
    temperature: float,
    *,
    symmetric: bool = True,
    candidates: tuple[Tensor, Tensor] | None = None,
    offset: int = 0,
    same_subject: Tensor | None = None,
) -> Tensor:
    """Crossmodal semantic contrastive loss on the CLS tokens (equation 4) -> scalar.

    -(1/2B) sum_i [log softmax_j(cos(v_i, t_j)/tau)_i + log softmax_j(cos(t_i, v_j)/tau)_i]; one-directional
    (`symmetric=False`): only the first term, over B.

    v, t [B, d]: the rows of this rank. `candidates` = (V, T) [C, d] of all ranks (default: the rows themselves), row i
    being candidate offset + i. `same_subject` bool [B, C]: pairs that are not negatives although i != j.
    """
    all_v, all_t = candidates if candidates is not None else (v, t)
    forward = _info_nce(cosine(v, all_t) / temperature, offset, same_subject)
    if not symmetric:
        return forward
    return (forward + _info_nce(cosine(t, all_v) / temperature, offset, same_subject)) / 2


def macl(
    anchors: Tensor,
    positives: Tensor,
    real_similarity: Tensor,
    temperature: float,
    *,
    factor: Factor = "inverse",
    similarity: Similarity = "cosine",
    offset: int = 0,
    same_subject: Tensor | None = None,
) -> Tensor:
    """Multiscale appearance contrastive loss in the S+ space (equation 7) -> scalar, mean over samples and levels.

    -(1/BL) sum_il log[exp(a_ii' s(s_i^l, p_i^l)/tau) / sum_k exp(a_ik s(s_i^l, p_k^l)/tau)]

    anchors [B, L, d]: S+ of this rank's references. positives [C, L, d]: S+ of all ranks' positives, that of anchor i
    at offset + i. real_similarity M [B, C] in -1..1: cosine of the image embeddings of the segmented subjects; it
    carries no gradient. `same_subject` bool [B, C]: pairs left out of the sum, the anchor's own positive excepted.

    `factor` a_ik: `inverse` 1/clamp(M, 0.2, 1), so that s_ik, which the loss levels at a_ik s_ik = const, grows with M;
    `two_minus` 2 - clamp(M, 0, 1); `none` 1, which is InfoNCE; `soft_target` a = 1 and, instead of the one-hot target,
    softmax_k(M_ik / tau).
    `similarity` s: the cosine, or `shifted` (1 + cosine)/2, which keeps the sign of a_ik s_ik and with it the order.
    The factor's form, the shift and the soft target are readings of the method; the paper's equation is lost.
    """
    logits = appearance_similarity(anchors, positives, similarity)
    real = real_similarity.detach().float()
    logits = logits * scaling_factor(real, factor)[:, None, :] / temperature
    own = _own_column(logits.shape[0], logits.shape[-1], offset, logits.device)
    excluded = torch.zeros_like(real, dtype=torch.bool) if same_subject is None else same_subject & ~own
    log_share = logits.masked_fill(excluded[:, None, :], -torch.inf).log_softmax(dim=-1)
    if factor == "soft_target":
        target = (real / temperature).masked_fill(excluded, -torch.inf).softmax(dim=-1)
        return -(target[:, None, :] * log_share.masked_fill(excluded[:, None, :], 0)).sum(dim=-1).mean()
    return -log_share.masked_select(own[:, None, :]).mean()


def appearance_similarity(anchors: Tensor, positives: Tensor, similarity: Similarity = "cosine") -> Tensor:
    """s of MACL, level by level: anchors [B, L, d], positives [C, L, d] -> [B, L, C] float32; see `macl`."""
    found = torch.einsum("bld,cld->blc", F.normalize(anchors.float(), dim=-1), F.normalize(positives.float(), dim=-1))
    if similarity == "shifted":
        return (1 + found) / 2
    if similarity != "cosine":
        raise ModelError(f"similarity '{similarity}' is unknown; use cosine or shifted")
    return found


def retrieval_accuracy(similarity: Tensor, offset: int = 0, same_subject: Tensor | None = None) -> Tensor:
    """Share of rows whose own candidate is more similar than every other -> scalar in 0..1; chance is 1/C.

    similarity [B, C], or [B, L, C] for the mean over levels too; row i's own candidate is offset + i. `same_subject`
    bool [B, C] as in `macl`. A tie is a miss, so that collapsed vectors score 0.
    """
    if similarity.ndim == 2:
        similarity = similarity[:, None]
    own = _own_column(similarity.shape[0], similarity.shape[-1], offset, similarity.device)
    others = own if same_subject is None else own | same_subject
    best = similarity.masked_fill(others[:, None], -torch.inf).amax(dim=-1)
    return (similarity.masked_fill(~own[:, None], 0).sum(dim=-1) > best).float().mean()


def scaling_factor(real_similarity: Tensor, factor: Factor) -> Tensor:
    """a_ik of MACL from M_ik, same shape; see `macl`."""
    if factor == "inverse":
        return 1 / real_similarity.clamp(SIMILARITY_FLOOR, 1)
    if factor == "two_minus":
        return 2 - real_similarity.clamp(0, 1)
    if factor in ("none", "soft_target"):
        return torch.ones_like(real_similarity)
    raise ModelError(f"factor '{factor}' is unknown; use inverse, none, two_minus or soft_target")


def location_loss(maps: Tensor, subject: Tensor, scale: MapScale | None = None) -> Tensor:
    """Mean of each attention map over the background minus its mean over the subject (FastComposer's form) -> [B].

    maps [B, ..., h, w] in 0..1; subject [B, h, w] in 0..1 (a soft mask weights the means). The mean over all maps of a
    sample is returned; -1 is perfect, 0 uniform. Samples that are all subject or all background give 0.

    `scale` divides each map by a number of its own. Maps that are one softmax over ALL their tokens need it: they sum
    to 1 at every pixel, the loss is linear, so its mean over these tokens is 0 whatever they look like. With `peak`,
    the map's largest value, a map is perfect if it is even on the subject; with `means`, the sum of its two means, it
    may attend to any part of it.
    """
    maps = maps.float()
    subject = subject.float()
    if scale == "peak":
        maps = maps / maps.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-6)
    weights = subject.reshape(subject.shape[0], *[1] * (maps.ndim - 3), *subject.shape[1:])
    area = weights.sum(dim=(-2, -1))
    rest = (1 - weights).sum(dim=(-2, -1))
    inside = (maps * weights).sum(dim=(-2, -1)) / area.clamp_min(1e-6)
    outside = (maps * (1 - weights)).sum(dim=(-2, -1)) / rest.clamp_min(1e-6)
    both = (area > 0) & (rest > 0)
    contrast = outside - inside
    if scale == "means":
        contrast = contrast / (outside + inside).clamp_min(1e-6)
    return torch.where(both, contrast, 0).flatten(start_dim=1).mean(dim=1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of all pairs of rows, [B, d] x [C, d] -> [B, C], float32."""
    return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T


def gather_rows(rows: Tensor) -> Tensor:
    """[B, ...] of this rank -> [world * B, ...] of all ranks in rank order, with gradient; itself without a process
    group.

    Each rank's rows receive the sum of all ranks' gradients, so averaging parameters' gradients over ranks (what data
    parallelism does) gives those of the mean loss over the global batch. All ranks must hold the same number of rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


def rank_offset(rows: int) -> int:
    """Index of this rank's first row in the result of `gather_rows`, for `rows` rows per rank."""
    return dist.get_rank() * rows if dist.is_available() and dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        ctx.rows = rows.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]


def _schedule(alphas_cumprod: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    alpha = alphas_cumprod.to(like.device, torch.float32)[timesteps].reshape(-1, 1, 1, 1)
    return alpha.sqrt().to(like.dtype), (1 - alpha).sqrt().to(like.dtype)


def _own_column(rows: int, columns: int, offset: int, device: torch.device) -> Tensor:
    """bool [B, C], True where the column is the row's own positive."""
    if offset + rows > columns:
        raise ModelError(
            f"{rows} rows at offset {offset} do not fit {columns} candidates; gather all ranks' rows first"
        )
    own = torch.arange(rows, device=device) + offset
    return own[:, None] == torch.arange(columns, device=device)


def _info_nce(logits: Tensor, offset: int, same_subject: Tensor | None) -> Tensor:
    own = _own_column(logits.shape[0], logits.shape[1], offset, logits.device)
    if same_subject is not None:
        logits = logits.masked_fill(same_subject & ~own, -torch.inf)
    return -logits.log_softmax(dim=-1).masked_select(own).mean()
