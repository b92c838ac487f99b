"""One training step: from cached latents, features and captions to the four losses (method, sections 1 to 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from model import losses
from model.methods.base import AdapterOutput
from model.methods.config import AdapterConfig
from model.objective import ObjectiveConfig, TrainingBatch, check_batch, diffusion_losses

if TYPE_CHECKING:
    from model.backbones.diffusion import Diffusion


def training_losses(
    batch: TrainingBatch,
    adapter: Callable[..., AdapterOutput],
    adapter_config: AdapterConfig,
    diffusion: Diffusion,
    config: ObjectiveConfig,
) -> dict[str, Tensor]:
    """`diffusion`, `cscl`, `macl`, `location` and their weighted sum `total`, scalars in float32; a loss that is
    switched off is 0.

    Also returned, detached: `sample_diffusion` [B], L_diff of each sample, and for each contrastive loss that is on its
    `cscl_accuracy` or `macl_accuracy`, see `contrastive_losses`.

    `adapter` is the Adapter or an engine around it, called once; `adapter.install(diffusion.unet)` must have been
    called before. Contrastive negatives come from all ranks. Guidance dropout affects only the diffusion and location
    losses: dropped conditions are omitted (the visual branch's scale is 0, the caption plain), so the model without
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


def contrastive_losses(out: AdapterOutput, batch: TrainingBatch, config: ObjectiveConfig) -> dict[str, Tensor]:
    """CSCL on the CLS tokens and MACL on S+ over the global batch, and the retrieval accuracy of each.

    `cscl_accuracy`: of v among all t and, if the loss is symmetric, of t among all v, averaged. `macl_accuracy`: of the
    reference's S+ among all positives' at the same level, averaged over levels, by the similarity inside MACL without
    its factor a_ik, which depends on the pair and would separate the subjects by itself.
    """
    zero = batch.latents.new_zeros((), dtype=torch.float32)
    parts = {"cscl": zero, "macl": zero}
    rows = batch.subjects.shape[0]
    offset = losses.rank_offset(rows)
    same_subject = batch.subjects[:, None] == losses.gather_rows(batch.subjects)[None, :]
    v, t = out.mfi.v_cls, out.mfi.t_cls
    if config.cscl and v is not None and t is not None:
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
    """S+ per text encoder [B, L, n_t, d_text] -> [B, L, sum of n_t d_text], every token scaled to length 1.

    The cosine of two such vectors is the mean of the tokens' cosines over tokens and text encoders [a reading; the
    paper's one token and one encoder leave no choice].
    """
    return torch.cat([F.normalize(s.float(), dim=-1).flatten(start_dim=2) for s in s_plus], dim=-1)
