"""RealCustom++'s projector against its formulas written out in float64, and at the published sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from model.methods.realcustom_pp.projector import MinAttention, Projector, place_by_place
from runtime.errors import ModelError

D, HEAD, N, W = 12, 4, 3, 5


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def min_attention(attention: MinAttention, queries: Tensor, features: Tensor) -> Tensor:
    """For one image, one head and one query after the other: queries [Q, d], features [N, d]."""
    q = layer_norm(queries, attention.norm_queries) @ attention.to_q.weight.T
    normed = layer_norm(features, attention.norm_features)
    k, v = normed @ attention.to_k.weight.T, normed @ attention.to_v.weight.T
    out = torch.zeros_like(queries)
    for start in range(0, q.shape[1], attention.head):
        rows = slice(start, start + attention.head)
        for n in range(len(q)):
            share = torch.stack([(q[n, rows] * key).sum() for key in k[:, rows]]).div(math.sqrt(attention.head)).exp()
            out[n, rows] = (share[:, None] * v[:, rows]).sum(dim=0) / share.sum()
    return out


def branch(module, queries: Tensor, features: Tensor) -> Tensor:
    first, _, second, _, third, norm = module.mlp
    hidden = gelu(min_attention(module.attention, queries, features) @ first.weight.T + first.bias)
    hidden = gelu(hidden @ second.weight.T + second.bias)
    return layer_norm(hidden @ third.weight.T + third.bias, norm)


def perturbed(**settings: bool) -> Projector:
    torch.manual_seed(0)
    projector = Projector(feature_width=D, visual_width=W, head=HEAD, **settings).double()
    for parameter in projector.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return projector


def make(views: int) -> Tensor:
    return torch.randn(2, views, N, D, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("high", [True, False])
@pytest.mark.parametrize("shallow", [True, False])
def test_tokens_are_base_plus_detail_then_structure(high: bool, shallow: bool):
    projector, features = perturbed(high=high, shallow=shallow), make(1 + 4 * high + 3 * shallow)
    found = projector(features)
    for image in range(2):
        low = features[image, 0]
        expected = low @ projector.base.weight.T + projector.base.bias
        if high:
            places = torch.stack([features[image, 1 + view, place] for place in range(N) for view in range(4)])
            expected = expected + branch(projector.detail, low, places)
        if shallow:
            layers = torch.cat([features[image, -3], features[image, -2], features[image, -1]])
            expected = torch.cat([expected, branch(projector.structure, low, layers)])
        torch.testing.assert_close(found[image], expected, rtol=1e-10, atol=1e-12)


def test_tokens_of_the_high_views_are_ordered_place_by_place():
    views = torch.arange(2 * 4 * N).view(2, 4, N, 1)
    assert place_by_place(views)[0, :, 0].tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]


def test_every_part_learns():
    projector = perturbed(shallow=True)
    projector(make(8)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in projector.parameters())


@pytest.mark.parametrize(
    ("visual_width", "shallow", "count"),
    [(2048, False, 59_649_024), (2048, True, 114_839_552), (768, False, 42_111_744), (768, True, 82_551_552)],
)
def test_parameters_at_the_published_sizes(visual_width: int, shallow: bool, count: int):
    with torch.device("meta"):
        projector = Projector(feature_width=1152 + 1024, visual_width=visual_width, shallow=shallow)
        tokens = projector(torch.empty(1, 8 if shallow else 5, 729, 2176))
    assert sum(p.numel() for p in projector.parameters()) == count
    assert sum(p.numel() for p in projector.detail.attention.parameters()) == 14_213_632
    assert tokens.shape == (1, 1458 if shallow else 729, visual_width)


def test_what_does_not_fit_is_one_sentence():
    with pytest.raises(ModelError, match="heads of width 5 do not divide the features' 12; choose a divisor"):
        Projector(feature_width=12, visual_width=W, head=5)
    with pytest.raises(ModelError, match="the features have 5 views and layers, expected 8"):
        perturbed(shallow=True)(make(5))
