"""RealCustom's scoring module against its formulas written out in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.methods.base import DenoisingState
from model.methods.config import AdapterConfig, ScoringConfig
from model.methods.realcustom.scoring import ContextScore, KeyFeatureEncoder, key_features

IMAGES, PATCHES, WIDTH, TEXT, CHANNELS, SIDE = 2, 6, 8, 5, 4, 3


def config(**scoring) -> AdapterConfig:
    return AdapterConfig(
        base_model="tiny",
        base_revision=None,
        image_encoder="tiny-clip",
        feature_layers=(1, 2),
        feature_width=WIDTH,
        inner_widths=(16,),
        levels=(0,),
        visual_width=WIDTH,
        text_widths=(3, 4),
        encoder="realcustom",
        textual=False,
        tv_fusion=False,
        scoring=ScoringConfig(**scoring),
    )


def encoder(**scoring) -> KeyFeatureEncoder:
    torch.manual_seed(0)
    return KeyFeatureEncoder(config(**scoring)).double()


def features(seed: int = 1) -> Tensor:
    return torch.randn(IMAGES, 2, PATCHES + 1, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def state(**changes) -> DenoisingState:
    generator = torch.Generator().manual_seed(2)
    made = DenoisingState(
        text=torch.randn(IMAGES, TEXT, 7, generator=generator).double(),
        latents=torch.randn(IMAGES, CHANNELS, SIDE, SIDE, generator=generator).double(),
        alphas=torch.tensor([0.3, 0.9]).double(),
        key_ratio=0.5,
    )
    return replace(made, **changes)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def score(network: ContextScore, f: Tensor, x: Tensor) -> Tensor:
    """MLP2([f, C]) patch by patch, C = sum over the sequence of softmax(x w) x."""
    w = network.column.weight[0]
    shares = torch.stack([torch.exp(w @ row) for row in x])
    context = sum(share * row for share, row in zip(shares / shares.sum(), x, strict=True))
    up, _, down = network.mlp
    return torch.stack(
        [down.weight[0] @ gelu(up.weight @ torch.cat([row, context]) + up.bias) + down.bias[0] for row in f]
    )


def written_out(module: KeyFeatureEncoder, f: Tensor, at: DenoisingState, row: int, fusion: str) -> Tensor:
    """Scaled features [n, d] of one image, and its scores [n]."""
    pixels = torch.stack([at.latents[row, :, y, x] for y in range(SIDE) for x in range(SIDE)])
    sequences = {"text": at.text[row], "visual": pixels}
    found = {name: score(network, f, sequences[name]) for name, network in module.scoring.networks.items()}
    late = at.alphas[row] ** 0.5
    fused = {
        "schedule": lambda: (1 - late) * found["text"] + late * found["visual"],
        "mean": lambda: 0.5 * found["text"] + 0.5 * found["visual"],
        "text": lambda: found["text"],
        "visual": lambda: found["visual"],
    }[fusion]()
    return fused.exp() / fused.exp().sum()


@pytest.mark.parametrize("fusion", ["schedule", "mean", "text", "visual"])
def test_scores_scale_the_features_and_choose_the_keys(fusion):
    module, f, at = encoder(fusion=fusion, gain=3.0), features(), state()
    out = module(f, torch.zeros(IMAGES), at).visual_tokens
    assert out.shape == (IMAGES, 3, WIDTH)
    for row in range(IMAGES):
        patches = f[row, -1, 1:]
        scores = written_out(module, patches, at, row, fusion)
        best = sorted(range(PATCHES), key=lambda n: -scores[n])[:3]
        expected = torch.stack([patches[n] * (1 + 3 * scores[n]) for n in best])
        torch.testing.assert_close(out[row], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("alpha", "other"), [(0.0, "latents"), (1.0, "text")])
def test_noise_listens_to_the_text_alone_and_no_noise_to_the_latents_alone(alpha, other):
    module, f, at = encoder(), features(), state(alphas=torch.full((IMAGES,), alpha).double())
    changed = replace(at, **{other: getattr(at, other).flip(0) + 1})
    both = [module(f, torch.zeros(IMAGES), one).visual_tokens for one in (at, changed)]
    assert torch.equal(*both)
    half = [replace(one, alphas=at.alphas * 0 + 0.5) for one in (at, changed)]
    assert not torch.equal(*(module(f, torch.zeros(IMAGES), one).visual_tokens for one in half))


def test_equal_scores_and_all_features_kept_scale_by_one_plus_one_over_n():
    module, f = encoder(), features()
    for network in module.scoring.networks.values():
        torch.nn.init.zeros_(network.mlp[2].weight)
    out = module(f, torch.zeros(IMAGES), state(key_ratio=1.0)).visual_tokens
    for row in range(IMAGES):
        expected = f[row, -1, 1:] * (1 + 1 / PATCHES)
        assert out.shape[1] == PATCHES
        torch.testing.assert_close(out[row].sort(dim=0).values, expected.sort(dim=0).values)


def test_order_of_patches_does_not_matter():
    module, f = encoder(), features()
    shuffled = f[:, :, [0, 4, 2, 6, 1, 3, 5]]
    at = state()
    torch.testing.assert_close(*(module(one, torch.zeros(IMAGES), at).visual_tokens for one in (f, shuffled)))


def test_without_scores_all_patches_of_the_last_layer_are_left_and_nothing_is_trained():
    module, f = encoder(fusion="none"), features()
    assert torch.equal(module(f, torch.zeros(IMAGES), state()).visual_tokens, f[:, -1, 1:])
    assert not list(module.parameters())


@pytest.mark.parametrize(("ratio", "count"), [(0.7, 7), (0.3, 3), (0.01, 1), (1.0, 10), (0.69, 6)])
def test_a_share_of_the_features_is_kept_at_least_one(ratio, count):
    scores = torch.rand(2, 10)
    kept = key_features(torch.arange(10.0)[None, :, None].expand(2, 10, 1), scores, ratio)[..., 0].long()
    for row in range(2):
        assert set(kept[row].tolist()) == set(scores[row].argsort(descending=True)[:count].tolist())


def test_half_precision_does_not_round_the_scores():
    module = encoder().bfloat16()
    scores = module.scoring(features()[:, -1, 1:].bfloat16(), state())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(IMAGES))
