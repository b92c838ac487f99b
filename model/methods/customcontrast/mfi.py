"""Multimodal Feature Injection encoder: visual Q-Former, textual Q-Former, TV fusion (method, section 2; paper, 3.2).

Axes: B images, T timesteps, K image-encoder layers, N tokens of each, L levels (conditioned cross-attention layers or
groups of them), n_t text tokens per level, n_v visual tokens, w = the encoder's own width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from model.methods.base import EncoderOutput

QUERY_STD = 1.0
"""Initial standard deviation of learned queries, as for OpenFlamingo's latents [a reading]. Queries far smaller than
what the first attention adds to them leave all tokens of an image alike, and TV fusion then collapses them into one:
attention over equal keys has no gradient that could separate them."""


class FeatureProjection(nn.Module):
    """Hidden states of K layers -> one sequence: LayerNorm + Linear per layer, concatenated on the token axis [a
    reading]."""

    def __init__(self, layers: int, feature_width: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(feature_width) for _ in range(layers))
        self.linears = nn.ModuleList(nn.Linear(feature_width, width) for _ in range(layers))

    def forward(self, features: Tensor) -> Tensor:
        """[B, K, N, d] -> f [B, K N, w]."""
        features = features.to(next(self.parameters()).dtype)
        parts = [
            linear(norm(layer))
            for norm, linear, layer in zip(self.norms, self.linears, features.unbind(dim=1), strict=True)
        ]
        return torch.cat(parts, dim=1)


class PerceiverAttention(nn.Module):
    """PA(q, f) = softmax((LN(q) Wq)([LN(f), LN(q)] Wk)^T / sqrt(d_head)) ([LN(f), LN(q)] Wv) Wo (equation 2).

    Awadalla et al. 2023. Features are many and queries few, so the features are never projected: of one head,
    q (LN(f) Wk)^T = (q Wk^T) LN(f)^T and p (LN(f) Wv) = (p LN(f)) Wv. With h heads, Q queries, N features and width w
    that is 2 Q h N w multiplications instead of 2 N w^2, and nothing of the features' size is kept for the backward
    pass but the features themselves.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_features = nn.LayerNorm(width)
        self.norm_queries = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """q [B, T, Q, w] and the `standardized` f [B, N, w] of B images -> [B, T, Q, w]."""
        scale, shift = self.norm_features.weight, self.norm_features.bias
        to_k, to_v = (rearrange(part.weight, "(h d) w -> h d w", h=self.heads) for part in (self.to_k, self.to_v))
        queries = self.norm_queries(queries)
        query, key, value = (
            rearrange(part(queries), "b t q (h d) -> b t h q d", h=self.heads)
            for part in (self.to_q, self.to_k, self.to_v)
        )
        query = query * query.shape[-1] ** -0.5
        probe = torch.einsum("bthqd,hdw->bthqw", query, to_k)
        with_features = torch.einsum("bthqw,bnw->bthqn", probe * scale, features) + (probe @ shift)[..., None]
        shares = torch.cat([with_features, query @ key.mT], dim=-1).softmax(dim=-1)
        of_features, of_queries = shares.split([features.shape[1], queries.shape[2]], dim=-1)
        mean = torch.einsum("bthqn,bnw->bthqw", of_features, features)
        mean = mean * scale + of_features.sum(dim=-1, keepdim=True) * shift
        out = torch.einsum("bthqw,hdw->bthqd", mean, to_v) + of_queries @ value
        return self.to_out(rearrange(out, "b t h q d -> b t q (h d)"))


def standardized(features: Tensor) -> Tensor:
    """Features with mean 0 and variance 1 over the last axis: LayerNorm without scale and shift, which every
    `PerceiverAttention` on them has of its own."""
    return F.layer_norm(features, features.shape[-1:])


class QFormer(nn.Module):
    """`depth` layers of q += PA(q, f); q += FFN(q), and a LayerNorm at the end [the last norm as in OpenFlamingo]."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(PerceiverAttention(width, heads) for _ in range(depth))
        self.feed_forwards = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width, bias=False),
                nn.GELU(),
                nn.Linear(4 * width, width, bias=False),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """q [B, T, Q, w], `standardized` f [B, N, w] -> [B, T, Q, w]."""
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            queries = queries + attention(queries, features)
            queries = queries + feed_forward(queries)
        return self.norm(queries)


class FourierCode(nn.Module):
    """NeTI's fixed random code of (timestep, level): g = [sin(W (t, l)), cos(W (t, l))] / norm (Alaluf et al. 2023).

    W [pairs, 2] has columns N(0, sigma_t^2) and N(0, sigma_l^2); it is drawn from `seed`, never trained, and saved.
    """

    frequencies: Tensor

    def __init__(self, pairs: int, sigma_t: float, sigma_l: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        frequencies = torch.randn(pairs, 2, generator=generator, device="cpu") * torch.tensor(
            [sigma_t, sigma_l], device="cpu"
        )
        self.register_buffer("frequencies", frequencies)

    def forward(self, timesteps: Tensor, levels: int) -> Tensor:
        """timesteps [B, T] in 0..999 -> [B, T, L, 2 pairs], unit vectors, float32."""
        level = torch.arange(levels, device=timesteps.device, dtype=torch.float32)
        of_t, of_level = self.frequencies.unbind(dim=1)
        # Phases reach a hundred radians and must not be rounded: products and sums, which autocast leaves in float32.
        phase = timesteps.float()[..., None, None] * of_t + level[:, None] * of_level
        # |[sin, cos]| = sqrt(pairs) exactly.
        return torch.cat([phase.sin(), phase.cos()], dim=-1) / self.frequencies.shape[0] ** 0.5

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .half() or .bfloat16() on the adapter moves W but must not round it: the phases would change.
        exact = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = exact.to(device=self.frequencies.device)
        return self


class TextualQFormer(nn.Module):
    """Queries Q(t, l) = E_l + MLP(g(t, l)) for all levels and one CLS query, in one pass per (image, timestep)."""

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int,
        levels: int,
        tokens: int,
        text_widths: Sequence[int],
        code: FourierCode,
    ) -> None:
        super().__init__()
        self.levels, self.tokens = levels, tokens
        self.level_embedding = nn.Parameter(torch.randn(levels, tokens, width) * QUERY_STD)
        self.cls_query = nn.Parameter(torch.randn(width) * QUERY_STD)
        self.code = code
        self.mlp = nn.Sequential(nn.Linear(2 * code.frequencies.shape[0], width), nn.GELU(), nn.Linear(width, width))
        self.former = QFormer(width, heads, depth)
        self.heads = nn.ModuleList(nn.Linear(width, text_width) for text_width in text_widths)

    def queries(self, timesteps: Tensor) -> Tensor:
        """[B, T] -> [B, T, L n_t + 1, w]; the last query is the CLS."""
        code = self.code(timesteps, self.levels).to(self.level_embedding.dtype)
        levels = self.level_embedding + self.mlp(code)[..., None, :]
        cls = self.cls_query.expand(*timesteps.shape, 1, -1)
        return torch.cat([rearrange(levels, "b t l n w -> b t (l n) w"), cls.to(levels.dtype)], dim=2)

    def forward(self, features: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """`standardized` f of B images, t [B, T] -> T without CLS [B, T, L n_t, w], CLS [B, T, w], and S+ per text
        encoder [B, T, L, n_t, d_text]."""
        out = self.former(self.queries(timesteps), features)
        tokens, cls = out[:, :, :-1], out[:, :, -1]
        s_plus = tuple(rearrange(head(tokens), "b t (l n) d -> b t l n d", n=self.tokens) for head in self.heads)
        return tokens, cls, s_plus


class VisualQFormer(nn.Module):
    """n_v learned queries and a CLS query -> V."""

    def __init__(self, width: int, heads: int, depth: int, tokens: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens + 1, width) * QUERY_STD)
        self.former = QFormer(width, heads, depth)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """`standardized` f [B, N, w] -> V without CLS [B, n_v, w], CLS [B, w]."""
        queries = repeat(self.queries, "q w -> b 1 q w", b=features.shape[0])
        out = self.former(queries, features)[:, 0]
        return out[:, :-1], out[:, -1]


class MFIEncoder(nn.Module):
    """Image features and timestep -> S+ for the text encoder and V~ for the visual cross-attention.

    The rows of the paper's Table 3: `textual=False` visual Q-Former only, `textual=True, tv_fusion=False` both
    Q-Formers, both True the whole encoder. Visual tokens are mapped by Linear + LayerNorm to `visual_width`, the UNet's
    cross-attention width, so that K' and V' can start from the frozen W_k and W_v [a reading].
    """

    def __init__(
        self,
        *,
        feature_layers: int,
        feature_width: int,
        width: int,
        heads: int,
        depth: int,
        visual_tokens: int,
        visual_width: int,
        levels: int,
        text_tokens: int,
        text_widths: Sequence[int],
        textual: bool,
        tv_fusion: bool,
        code: tuple[int, float, float, int],
    ) -> None:
        """`code` = (pairs, sigma_t, sigma_l, seed) of the Fourier code; the rest as in `AdapterConfig`."""
        super().__init__()
        self.features = FeatureProjection(feature_layers, feature_width, width)
        self.visual = VisualQFormer(width, heads, depth, visual_tokens)
        self.textual = (
            TextualQFormer(width, heads, depth, levels, text_tokens, text_widths, FourierCode(*code))
            if textual
            else None
        )
        self.fusion = PerceiverAttention(width, heads) if tv_fusion else None
        self.visual_head = nn.Sequential(nn.Linear(width, visual_width), nn.LayerNorm(visual_width))

    def forward(self, features: Tensor, timesteps: Tensor) -> EncoderOutput:
        """features [B, K, N, d], timesteps [B] (one per image) -> EncoderOutput without a T axis."""
        return self.with_positives(features, timesteps, features[:0], timesteps[:0])[0]

    def with_positives(
        self, features: Tensor, timesteps: Tensor, positives: Tensor, positive_timesteps: Tensor
    ) -> tuple[EncoderOutput, tuple[Tensor, ...] | None]:
        """`forward` of B references and S+ of P positives, [P, L, n_t, d_text] per text encoder, in one pass.

        positives [P, K, N, d] and their timesteps [P]. Without a textual Q-Former there is no S+.
        """
        count = len(features)
        every = standardized(self.features(torch.cat([features, positives])))
        v_tokens, v_cls = self.visual(every[:count])
        if self.textual is None:
            return EncoderOutput(v_cls, v_tokens, None, None, self.visual_head(v_tokens)), None
        tokens, cls, s_plus = self.textual(every, torch.cat([timesteps, positive_timesteps])[:, None])
        visual_tokens = v_tokens
        if self.fusion is not None:
            visual_tokens = self.fusion(tokens[:count], standardized(v_tokens))[:, 0]
        out = EncoderOutput(
            v_cls=v_cls,
            v_tokens=v_tokens,
            t_cls=cls[:count, 0],
            s_plus=tuple(s[:count, 0] for s in s_plus),
            visual_tokens=self.visual_head(visual_tokens),
        )
        return out, tuple(s[count:, 0] for s in s_plus)

    def at_timesteps(self, features: Tensor, timesteps: Tensor, chunk: int = 16) -> EncoderOutput:
        """features [B, K, N, d] and timesteps [T], all of them for every image -> EncoderOutput with a T axis.

        Everything that depends only on the image is computed once. `chunk` timesteps run at a time, which bounds
        memory.
        """
        f = standardized(self.features(features))
        v_tokens, v_cls = self.visual(f)
        if self.textual is None:
            return EncoderOutput(v_cls, v_tokens, None, None, self.visual_head(v_tokens))
        visual = standardized(v_tokens)
        cls, s_plus, fused = [], [], []
        for part in timesteps.expand(len(features), -1).split(chunk, dim=1):
            t_tokens, t_cls, s = self.textual(f, part)
            cls.append(t_cls)
            s_plus.append(s)
            if self.fusion is not None:
                fused.append(self.visual_head(self.fusion(t_tokens, visual)))
        return EncoderOutput(
            v_cls=v_cls,
            v_tokens=v_tokens,
            t_cls=torch.cat(cls, dim=1),
            s_plus=tuple(torch.cat(parts, dim=1) for parts in zip(*s_plus, strict=True)),
            visual_tokens=torch.cat(fused, dim=1) if fused else self.visual_head(v_tokens),
        )

    def s_plus(self, features: Tensor, timesteps: Tensor) -> tuple[Tensor, ...]:
        """S+ only, [B, L, n_t, d_text] per text encoder, of features [B, K, N, d] at timesteps [B]. Needs a textual
        Q-Former."""
        assert self.textual is not None
        found = self.textual(standardized(self.features(features)), timesteps[:, None])[2]
        return tuple(s[:, 0] for s in found)
