"""Adaptive scoring (RealCustom): which image features count at this step, judged by the caption and by the latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.methods.base import DenoisingState, EncoderOutput
from model.methods.config import AdapterConfig

NETWORKS = {
    "schedule": ("text", "visual"),
    "mean": ("text", "visual"),
    "text": ("text",),
    "visual": ("visual",),
    "none": (),
}
"""Score networks of each `scoring.fusion`."""


class ContextScore(nn.Module):
    """A score for each image feature, given the context of a sequence x: MLP2([f, C]), C = A^T x, A = softmax(x w)."""

    def __init__(self, feature_width: int, context_width: int, hidden_width: int) -> None:
        super().__init__()
        self.column = nn.Linear(context_width, 1, bias=False)  # w
        self.mlp = nn.Sequential(
            nn.Linear(feature_width + context_width, hidden_width), nn.GELU(), nn.Linear(hidden_width, 1)
        )

    def forward(self, features: Tensor, sequence: Tensor) -> Tensor:
        """features [B, n, d], sequence [B, m, c] -> scores [B, n]."""
        context = self.column(sequence).softmax(dim=1).mT @ sequence  # [B, 1, c]
        return self.mlp(torch.cat([features, context.expand(-1, features.shape[1], -1)], dim=-1)).squeeze(-1)


class ScoringModule(nn.Module):
    """Scores of the image features of a step, a softmax over them.

    `schedule`: (1 - sqrt(a)) S_text + sqrt(a) S_visual, so that noise listens to the caption and the last steps to the
    latents.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.fusion = config.scoring.fusion
        contexts = {"text": sum(config.text_widths), "visual": config.latent_channels}
        hidden = config.scoring.width or config.feature_width
        self.networks = nn.ModuleDict(
            {name: ContextScore(config.feature_width, contexts[name], hidden) for name in NETWORKS[self.fusion]}
        )

    def forward(self, features: Tensor, state: DenoisingState) -> Tensor:
        """features [B, n, d] -> [B, n] in 0..1, each row sums to 1; in float32 at least."""
        sequences = {"text": state.text, "visual": state.latents.flatten(start_dim=2).mT}
        exact = torch.promote_types(features.dtype, torch.float32)
        scores = {
            name: network(features, sequences[name].to(features.dtype)).to(exact)
            for name, network in self.networks.items()
        }
        if self.fusion == "schedule":
            late = state.alphas.to(exact).sqrt()[:, None]
            fused = (1 - late) * scores["text"] + late * scores["visual"]
        else:
            fused = torch.stack(list(scores.values())).mean(dim=0)
        return fused.softmax(dim=-1)


class KeyFeatureEncoder(nn.Module):
    """The image's patch features, scaled by 1 + gain S, of which the share `key_ratio` with the highest scores S stays.

    S is about 1 / n and the choice has no gradient, so the score networks learn through that factor only.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.gain = config.scoring.gain
        self.scoring = ScoringModule(config) if NETWORKS[config.scoring.fusion] else None

    def forward(self, features: Tensor, timesteps: Tensor, state: DenoisingState) -> EncoderOutput:
        """features [B, K, N, d] -> EncoderOutput without text, of max(1, floor(key_ratio n)) tokens; n = N - 1.

        Only the patches of the last layer are read. Without scores (`fusion: none`) all n are kept as they are.
        """
        tokens = features[:, -1, 1:]
        if self.scoring is not None:
            tokens = tokens.to(next(self.scoring.parameters()).dtype)
            scores = self.scoring(tokens, state)
            tokens = key_features(
                tokens * (1 + self.gain * scores)[..., None].to(tokens.dtype), scores, state.key_ratio
            )
        return EncoderOutput(v_cls=tokens.mean(dim=1), v_tokens=tokens, t_cls=None, s_plus=None, visual_tokens=tokens)


def key_features(features: Tensor, scores: Tensor, ratio: float) -> Tensor:
    """The max(1, floor(ratio n)) features of highest score: features [B, n, d], scores [B, n] -> [B, k, d]."""
    # An exact share such as 0.7 of 10 may be a hair below its product.
    count = max(1, int(ratio * scores.shape[1] + 1e-6))
    kept = scores.topk(count, dim=1).indices
    return features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
