"""Losses against their formulas written out in float64, and what they make free embeddings do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import losses
from runtime.errors import ModelError


def cos(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def sample(batch: int = 5, levels: int = 3, width: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s, p = (torch.randn(batch, levels, width, generator=generator).double() for _ in range(2))
    m = torch.rand(batch, batch, generator=generator).double() * 1.4 - 0.4
    return s, p, m


FACTORS = {
    "inverse": lambda m: 1 / min(max(m, 0.2), 1),
    "two_minus": lambda m: 2 - min(max(m, 0), 1),
    "none": lambda m: 1.0,
}


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("similarity", ["cosine", "shifted"])
def test_macl_is_equation_7(factor, similarity):
    s, p, m = sample()
    tau, total = 0.3, 0.0
    for i in range(5):
        for level in range(3):
            terms = []
            for k in range(5):
                c = cos(s[i, level], p[k, level])
                c = (1 + c) / 2 if similarity == "shifted" else c
                terms.append(math.exp(FACTORS[factor](float(m[i, k])) * c / tau))
            total -= math.log(terms[i] / sum(terms))
    found = losses.macl(s, p, m, tau, factor=factor, similarity=similarity)
    assert found.item() == pytest.approx(total / 15, rel=1e-5)


def test_macl_with_soft_targets_is_their_cross_entropy():
    s, p, m = sample()
    tau, total = 0.3, 0.0
    for i in range(5):
        weights = [math.exp(float(m[i, k]) / tau) for k in range(5)]
        for level in range(3):
            terms = [math.exp(cos(s[i, level], p[k, level]) / tau) for k in range(5)]
            total -= sum(w / sum(weights) * math.log(e / sum(terms)) for w, e in zip(weights, terms, strict=True))
    assert losses.macl(s, p, m, tau, factor="soft_target").item() == pytest.approx(total / 15, rel=1e-5)


def test_macl_without_factor_is_info_nce():
    s, p, m = sample(levels=1)
    logits = torch.nn.functional.cosine_similarity(s[:, 0, None], p[None, :, 0], dim=-1) / 0.1
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(5))
    assert losses.macl(s, p, m, 0.1, factor="none").item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("factor", ["inverse", "soft_target"])
def test_pairs_of_one_subject_are_no_negatives(factor):
    s, p, m = sample(batch=4)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    found = losses.macl(s, p, m, 0.2, factor=factor, same_subject=same)
    parts = []
    for i, kept in ((0, [0, 2, 3]), (1, [1, 2, 3]), (2, [0, 1, 2, 3]), (3, [0, 1, 2, 3])):
        one = losses.macl(s[[i]], p[kept], m[[i]][:, kept], 0.2, factor=factor, offset=0 if i < 2 else i)
        parts.append(one.item())
    assert found.item() == pytest.approx(sum(parts) / 4, rel=1e-5)


def test_real_similarity_carries_no_gradient():
    s, p, m = sample()
    s.requires_grad_()
    m.requires_grad_()
    losses.macl(s, p, m, 0.2).backward()
    assert s.grad is not None and m.grad is None


def pearson(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def order_learned(factor: str, similarity: str = "cosine", tau: float = 0.5) -> float:
    """Correlation of learned with real similarities of negatives after MACL has moved free embeddings."""
    generator = torch.Generator().manual_seed(0)
    real = torch.nn.functional.normalize(torch.randn(12, 6, generator=generator) + 1.0, dim=-1)
    m = real @ real.T
    free = torch.randn(12, 1, 24, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        losses.macl(free, free, m, tau, factor=factor, similarity=similarity).backward()
        optimizer.step()
    rest = ~torch.eye(12, dtype=torch.bool)
    return pearson(losses.cosine(free[:, 0], free[:, 0]).detach()[rest], m[rest])


def test_inverse_factor_makes_learned_similarities_grow_with_real_ones():
    assert order_learned("inverse") > 0.6
    assert order_learned("inverse", "shifted", 0.07) > 0.6
    assert order_learned("soft_target") > 0.6
    assert order_learned("inverse") > order_learned("none") + 0.3


@pytest.mark.parametrize("symmetric", [True, False])
def test_cscl_is_equation_4(symmetric):
    v, t, _ = (x.squeeze() for x in sample(levels=1))
    tau, total = 0.2, 0.0
    for a, b in ((v, t), (t, v)) if symmetric else ((v, t),):
        for i in range(5):
            terms = [math.exp(cos(a[i], b[j]) / tau) for j in range(5)]
            total -= math.log(terms[i] / sum(terms))
    found = losses.cscl(v, t, tau, symmetric=symmetric)
    assert found.item() == pytest.approx(total / (10 if symmetric else 5), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.floats(0.05, 2), st.sampled_from(["inverse", "none", "two_minus"]))
def test_contrastive_losses_are_never_negative_and_ignore_lengths(batch, levels, tau, factor):
    s, p, m = sample(batch, levels, seed=batch * 10 + levels)
    loss = losses.macl(s, p, m, tau, factor=factor)
    assert loss >= 0
    scaled = losses.macl(s * 3, p * torch.rand(batch, levels, 1).add(0.5), m, tau, factor=factor)
    torch.testing.assert_close(scaled, loss, rtol=1e-4, atol=1e-5)
    assert losses.cscl(s[:, 0], p[:, 0], tau) >= 0


def two_ranks(rank: int, path: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    results.put((rank, step(slice(2 * rank, 2 * rank + 2))))
    dist.barrier()
    dist.destroy_process_group()


def step(rows: slice) -> tuple[float, list[list[float]]]:
    """Loss and gradient of a linear layer for these rows of a batch of 4, its negatives gathered."""
    s, p, m = sample(batch=4)
    torch.manual_seed(1)
    layer = torch.nn.Linear(7, 7).double()
    a, b = layer(s[rows]), layer(p[rows])
    own = len(range(*rows.indices(4)))
    offset = losses.rank_offset(own)
    candidates = losses.gather_rows(b)
    loss = losses.macl(a, candidates, m[rows], 0.3, offset=offset) + losses.cscl(
        a[:, 0],
        b[:, 1],
        0.3,
        candidates=(losses.gather_rows(a[:, 0]), losses.gather_rows(b[:, 1])),
        offset=offset,
    )
    loss.backward()
    assert layer.weight.grad is not None
    return loss.item(), layer.weight.grad.tolist()


def test_two_ranks_give_the_loss_and_gradients_of_one(tmp_path):
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=two_ranks, args=(rank, str(tmp_path / "store"), results), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    (loss_a, grad_a), (loss_b, grad_b) = (found for _, found in sorted(results.get() for _ in range(2)))
    loss, gradient = step(slice(0, 4))
    assert (loss_a + loss_b) / 2 == pytest.approx(loss, rel=1e-6)
    mean = (torch.tensor(grad_a) + torch.tensor(grad_b)) / 2
    torch.testing.assert_close(mean, torch.tensor(gradient), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("levels", [1, 3])
def test_retrieval_accuracy_is_the_share_of_rows_whose_own_candidate_is_the_most_similar(levels):
    s, _, _ = sample(batch=6, levels=levels)
    noisy = s + 2.5 * torch.randn(6, levels, 7, generator=torch.Generator().manual_seed(2))
    hits = 0
    for i in (2, 3, 4):
        for level in range(levels):
            found = [cos(s[i, level], noisy[k, level]) for k in range(6)]
            hits += found.index(max(found)) == i
    similarity = losses.appearance_similarity(s[2:5], noisy)
    assert losses.retrieval_accuracy(similarity, 2).item() == pytest.approx(hits / (3 * levels))
    assert 0 < hits < 3 * levels
    if levels == 1:
        assert losses.retrieval_accuracy(losses.cosine(s[2:5, 0], noisy[:, 0]), 2).item() == pytest.approx(hits / 3)


def test_retrieval_does_not_count_pairs_of_one_subject_and_a_tie_is_a_miss():
    similarity = torch.tensor([[0.5, 0.9, 0.1], [0.2, 0.6, 0.6], [0.1, 0.2, 0.3]])
    assert losses.retrieval_accuracy(similarity).item() == pytest.approx(1 / 3)
    same = torch.eye(3, dtype=torch.bool)
    same[0, 1] = True
    assert losses.retrieval_accuracy(similarity, same_subject=same).item() == pytest.approx(2 / 3)
    assert losses.retrieval_accuracy(torch.ones(4, 4)) == 0


def square() -> Tensor:
    mask = torch.zeros(2, 6, 6)
    mask[:, 2:5, 1:4] = 1
    return mask


def test_location_loss_is_minus_one_when_perfect_and_zero_when_uniform():
    mask = square()
    perfect = mask[:, None, None].expand(2, 3, 4, 6, 6)
    assert torch.equal(losses.location_loss(perfect, mask), torch.full((2,), -1.0))
    assert losses.location_loss(torch.full((2, 3, 4, 6, 6), 0.3), mask).abs().max() < 1e-6
    for scale in ("peak", "means"):
        assert torch.equal(losses.location_loss(perfect / 5, mask, scale), torch.full((2,), -1.0))


def test_location_loss_is_mean_outside_minus_mean_inside():
    maps, mask = torch.rand(2, 3, 6, 6), square()
    expected = [
        sum(maps[b, k][mask[b] == 0].mean() - maps[b, k][mask[b] == 1].mean() for k in range(3)) / 3 for b in range(2)
    ]
    torch.testing.assert_close(losses.location_loss(maps, mask), torch.stack(expected))


def test_location_loss_of_a_sample_without_background_or_subject_is_zero():
    maps = torch.rand(2, 3, 6, 6)
    mask = torch.stack([torch.zeros(6, 6), torch.ones(6, 6)])
    assert torch.equal(losses.location_loss(maps, mask), torch.zeros(2))


def test_location_loss_by_means_is_the_contrast_of_each_map_whatever_its_peak():
    maps, mask = torch.rand(2, 3, 6, 6), square()
    outside, inside = (
        torch.stack([torch.stack([m[k == value].mean() for m in of]) for of, k in zip(maps, mask, strict=True)])
        for value in (0, 1)
    )
    expected = ((outside - inside) / (outside + inside)).mean(dim=1)
    torch.testing.assert_close(losses.location_loss(maps, mask, "means"), expected)
    part = torch.zeros(1, 6, 6)
    part[:, 3, 2] = 1  # one pixel of the subject
    assert losses.location_loss(part[:, None], mask[:1], "means") == -1
    assert losses.location_loss(part[:, None], mask[:1], "peak") == pytest.approx(-1 / 9)


def test_maps_that_share_one_softmax_have_a_gradient_only_when_scaled():
    logits, mask = torch.randn(2, 5, 6, 6), square()
    gradients = {}
    for scale in (None, "peak", "means"):
        leaf = logits.clone().requires_grad_()
        losses.location_loss(leaf.softmax(dim=1), mask, scale).sum().backward()
        gradients[scale] = leaf.grad.norm().item()
    assert gradients[None] < 1e-6 < 1e-3 < min(gradients["peak"], gradients["means"])


@pytest.mark.parametrize("scale", ["peak", "means"])
def test_scaled_location_loss_teaches_tokens_to_stay_on_the_subject(scale: losses.MapScale):
    mask = square()
    leaf = (0.1 * torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))).requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = losses.location_loss(leaf.softmax(dim=1), mask, scale).sum()
        loss.backward()
        optimizer.step()
    assert loss.item() / 2 < -0.45


def test_diffusion_targets_follow_the_schedule():
    alphas = torch.linspace(0.99, 0.01, 10).double()
    z, noise, t = torch.randn(2, 4, 3, 3).double(), torch.randn(2, 4, 3, 3).double(), torch.tensor([2, 7])
    noisy = losses.noisy_latents(z, noise, alphas, t)
    v = losses.diffusion_target(z, noise, alphas, t, "v_prediction")
    for b in range(2):
        a = alphas[t[b]]
        torch.testing.assert_close(noisy[b], a.sqrt() * z[b] + (1 - a).sqrt() * noise[b], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(v[b], a.sqrt() * noise[b] - (1 - a).sqrt() * z[b], rtol=1e-6, atol=1e-6)
    assert losses.diffusion_target(z, noise, alphas, t, "epsilon") is noise
    assert losses.diffusion_target(z, noise, alphas, t, "sample") is z
    assert losses.diffusion_loss(z, noise).item() == pytest.approx(((z - noise) ** 2).mean().item(), rel=1e-6)


def test_targets_agree_with_the_scheduler_of_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type="v_prediction")
    z, noise, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([20, 700])
    torch.testing.assert_close(
        losses.noisy_latents(z, noise, scheduler.alphas_cumprod, t), scheduler.add_noise(z, noise, t)
    )
    torch.testing.assert_close(
        losses.diffusion_target(z, noise, scheduler.alphas_cumprod, t, "v_prediction"),
        scheduler.get_velocity(z, noise, t),
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: losses.scaling_factor(torch.ones(1), "power"),  # type: ignore[arg-type]
        lambda: losses.macl(*sample()[:2], sample()[2], 0.1, similarity="dot"),  # type: ignore[arg-type]
        lambda: losses.macl(*sample(), 0.1, offset=3),
        lambda: losses.diffusion_target(*[torch.ones(1)] * 4, "flow"),
    ],
)
def test_unknown_choices_are_one_sentence(call):
    with pytest.raises(ModelError, match=";"):
        call()
