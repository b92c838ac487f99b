"""From the hidden states of two frozen image towers to the visual tokens of the UNet (RealCustom++).

As in the official code, but for the structure branch, which is the paper figure's: the code then returns [B ; T] and
its detail branch is without effect.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.errors import ModelError

HIGH, SHALLOW = 4, 3
"""Entries of the features' K axis: views of high resolution, and shallow layers of the low view."""
EXPANSION = 4
"""Hidden width of an MLP, as a multiple of its input."""


class MinAttention(nn.Module):
    """Attention of a LayerNorm of queries over a LayerNorm of keys and values: no output projection, no residual."""

    def __init__(self, width: int, head: int) -> None:
        """`head`: width of each head; ModelError if it does not divide `width`."""
        super().__init__()
        if width % head:
            raise ModelError(f"projector: heads of width {head} do not divide the features' {width}; choose a divisor")
        self.head = head
        self.norm_queries, self.norm_features = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """queries [B, Q, d], features [B, N, d] -> [B, Q, d]."""
        features = self.norm_features(features)
        q = self.heads(self.to_q(self.norm_queries(queries)))
        k, v = self.heads(self.to_k(features)), self.heads(self.to_v(features))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(start_dim=2)

    def heads(self, rows: Tensor) -> Tensor:
        """[B, N, d] -> [B, heads, N, head]."""
        return rows.unflatten(-1, (-1, self.head)).transpose(1, 2)


class AttentionBranch(nn.Module):
    """MLP(MinAttention(queries, features))."""

    def __init__(self, width: int, visual_width: int, head: int) -> None:
        super().__init__()
        self.attention = MinAttention(width, head)
        self.mlp = nn.Sequential(
            nn.Linear(width, EXPANSION * width),
            nn.GELU(),
            nn.Linear(EXPANSION * width, visual_width),
            nn.GELU(),
            nn.Linear(visual_width, visual_width),
            nn.LayerNorm(visual_width),
        )

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """queries [B, Q, d], features [B, N, d] -> [B, Q, visual width]."""
        found: Tensor = self.mlp(self.attention(queries, features))
        return found


class Projector(nn.Module):
    """Base branch B, plus detail branch D over the high views; with `shallow` the structure branch T, in more tokens.

    B is a Linear of the low view's deep tokens, which are the queries of the other two branches.
    """

    def __init__(
        self, *, feature_width: int, visual_width: int, head: int = 64, high: bool = True, shallow: bool = False
    ) -> None:
        """`feature_width` d of both towers joined; `visual_width` of the tokens; `head` width of an attention head;
        `high`, `shallow`: whether the features have these views, and the projector their branch.

        Raises:
            ModelError: `head` does not divide `feature_width`.
        """
        super().__init__()
        self.base = nn.Linear(feature_width, visual_width)
        self.detail = AttentionBranch(feature_width, visual_width, head) if high else None
        self.structure = AttentionBranch(feature_width, visual_width, head) if shallow else None

    def forward(self, features: Tensor) -> Tensor:
        """features [B, K, N, d] -> tokens [B, m, visual width], m = N, or 2 N with `shallow`: [B + D ; T].

        K: the low view's deep layer, its four high views (`high`), its three shallow layers (`shallow`).

        Raises:
            ModelError: K is another number.
        """
        expected = 1 + HIGH * (self.detail is not None) + SHALLOW * (self.structure is not None)
        if features.shape[1] != expected:
            raise ModelError(
                f"projector: the features have {features.shape[1]} views and layers, expected {expected}; encode the"
                " references with the views that the adapter reads"
            )
        features = features.to(self.base.weight.dtype)
        low = features[:, 0]
        tokens: Tensor = self.base(low)
        if self.detail is not None:
            tokens = tokens + self.detail(low, place_by_place(features[:, 1 : 1 + HIGH]))
        if self.structure is not None:
            structure = self.structure(low, features[:, -SHALLOW:].flatten(1, 2))
            tokens = torch.cat([tokens, structure], dim=1)
        return tokens


def place_by_place(views: Tensor) -> Tensor:
    """[B, V, N, d] -> [B, N V, d]: the tokens of all views at the first place, then at the second, ..."""
    return views.transpose(1, 2).flatten(1, 2)
