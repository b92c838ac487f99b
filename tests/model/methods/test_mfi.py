"""The MFI encoder against its formulas written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.methods.customcontrast.mfi import FourierCode, MFIEncoder, PerceiverAttention, QFormer, standardized


def layer_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    spread = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / (spread + norm.eps).sqrt() * norm.weight + norm.bias


def perceiver_attention(pa: PerceiverAttention, q: Tensor, f: Tensor) -> Tensor:
    """Equation 2 for one image, one head after the other: q [Q, w], f [N, w]."""
    both = torch.cat([layer_norm(f, pa.norm_features), layer_norm(q, pa.norm_queries)])
    size = q.shape[-1] // pa.heads
    heads = []
    for h in range(pa.heads):
        rows = slice(h * size, (h + 1) * size)
        scores = (layer_norm(q, pa.norm_queries) @ pa.to_q.weight[rows].T) @ (both @ pa.to_k.weight[rows].T).T
        share = (scores / size**0.5).exp()
        heads.append(share / share.sum(dim=-1, keepdim=True) @ (both @ pa.to_v.weight[rows].T))
    return torch.cat(heads, dim=-1) @ pa.to_out.weight.T


def perturbed(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Float64, with norms that are not the identity."""
    torch.manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def encoder(**changes) -> MFIEncoder:
    torch.manual_seed(0)
    settings = {
        "feature_layers": 3,
        "feature_width": 12,
        "width": 16,
        "heads": 2,
        "depth": 2,
        "visual_tokens": 3,
        "visual_width": 20,
        "levels": 4,
        "text_tokens": 2,
        "text_widths": (10, 14),
        "textual": True,
        "tv_fusion": True,
        "code": (32, 0.03, 2.0, 0),
    }
    return perturbed(MFIEncoder(**{**settings, **changes}))


def features(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 5, 12, generator=torch.Generator().manual_seed(1)).double()


def test_perceiver_attention_is_equation_2():
    pa = perturbed(PerceiverAttention(12, 3))
    q, f = torch.randn(2, 4, 12).double(), torch.randn(2, 7, 12).double()
    out = pa(q[:, None], standardized(f))[:, 0]
    for b in range(2):
        torch.testing.assert_close(out[b], perceiver_attention(pa, q[b], f[b]), rtol=1e-10, atol=1e-12)


def test_q_former_layer_adds_attention_then_feed_forward():
    former = perturbed(QFormer(12, 3, depth=2))
    q, f = torch.randn(4, 12).double(), torch.randn(7, 12).double()
    expected = q
    for pa, feed_forward in zip(former.attentions, former.feed_forwards, strict=True):
        expected = expected + perceiver_attention(pa, expected, f)
        norm, up, _, down = feed_forward
        hidden = layer_norm(expected, norm) @ up.weight.T
        expected = expected + (hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))) @ down.weight.T
    expected = layer_norm(expected, former.norm)
    out = former(q[None, None], standardized(f[None]))[0, 0]
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_fourier_code_is_neti_s():
    code = FourierCode(pairs=1024, sigma_t=0.03, sigma_l=2.0, seed=3)
    t, levels = torch.tensor([[0, 999], [17, 500]]), 16
    out = code(t, levels)
    w = code.frequencies.double()
    for b in range(2):
        for k in range(2):
            for level in range(levels):
                phase = w @ torch.tensor([float(t[b, k]), float(level)]).double()
                g = torch.cat([phase.sin(), phase.cos()])
                torch.testing.assert_close(out[b, k, level].double(), g / g.norm(), rtol=0, atol=1e-5)
    assert w[:, 0].std().item() == pytest.approx(0.03, rel=0.1)
    assert w[:, 1].std().item() == pytest.approx(2.0, rel=0.1)


def test_fourier_code_is_drawn_from_its_seed_saved_and_never_trained():
    a, b, c = (FourierCode(8, 0.03, 2.0, seed) for seed in (1, 1, 2))
    assert torch.equal(a.frequencies, b.frequencies) and not torch.equal(a.frequencies, c.frequencies)
    assert list(a.state_dict()) == ["frequencies"] and not list(a.parameters())


def test_half_precision_does_not_round_the_fourier_code():
    code = FourierCode(8, 0.03, 2.0, seed=1)
    exact = code.frequencies.clone()
    assert torch.equal(code.bfloat16().frequencies, exact)


def test_textual_queries_are_level_embedding_plus_mlp_of_the_code():
    textual = encoder().textual
    t = torch.tensor([[10, 700]])
    code = textual.code(t, 4).double()
    queries = textual.queries(t)
    for k in range(2):
        for level in range(4):
            for n in range(2):
                expected = textual.level_embedding[level, n] + textual.mlp(code[0, k, level])
                torch.testing.assert_close(queries[0, k, level * 2 + n], expected)
    torch.testing.assert_close(queries[0, 0, -1], textual.cls_query)


def test_whole_encoder_is_its_parts_put_together_one_image_and_timestep_at_a_time():
    mfi, f, t = encoder(), features(), torch.tensor([5, 640, 999])
    out = mfi(f, t)
    for b in range(3):
        parts = [
            layer_norm(f[b, k], norm) @ linear.weight.T + linear.bias
            for k, (norm, linear) in enumerate(zip(mfi.features.norms, mfi.features.linears, strict=True))
        ]
        image = standardized(torch.cat(parts)[None])
        v = mfi.visual.former(mfi.visual.queries[None, None], image)[0, 0]
        text = mfi.textual.former(mfi.textual.queries(t[b].view(1, 1)), image)[0, 0]
        torch.testing.assert_close(out.v_cls[b], v[-1])
        torch.testing.assert_close(out.t_cls[b], text[-1])
        for s, head in zip(out.s_plus, mfi.textual.heads, strict=True):
            torch.testing.assert_close(s[b].flatten(0, 1), head(text[:-1]))
        fused = perceiver_attention(mfi.fusion, text[:-1], v[:-1])
        torch.testing.assert_close(out.visual_tokens[b], mfi.visual_head(fused), rtol=1e-9, atol=1e-11)


def test_many_timesteps_at_once_equal_one_after_the_other():
    mfi, f, t = encoder(), features(), torch.tensor([999, 640, 320, 5])
    many = mfi.at_timesteps(f, t, chunk=3)
    for k in range(4):
        one = mfi(f, t[k].expand(3))
        torch.testing.assert_close(many.visual_tokens[:, k], one.visual_tokens)
        torch.testing.assert_close(many.t_cls[:, k], one.t_cls)
        for s, expected in zip(many.s_plus, one.s_plus, strict=True):
            torch.testing.assert_close(s[:, k], expected)
    torch.testing.assert_close(many.v_cls, mfi(f, t[:3]).v_cls)


def test_s_plus_alone_equals_s_plus_of_the_whole():
    mfi, f, t = encoder(), features(), torch.tensor([1, 2, 3])
    for s, expected in zip(mfi.s_plus(f, t), mfi(f, t).s_plus, strict=True):
        torch.testing.assert_close(s, expected)


def test_positives_in_the_same_pass_change_nothing():
    mfi, f, positives = encoder(), features(5)[:3], features(5)[3:]
    t, of_positives = torch.tensor([1, 2, 3]), torch.tensor([700, 20])
    out, s_plus = mfi.with_positives(f, t, positives, of_positives)
    alone = mfi(f, t)
    for name in ("v_cls", "v_tokens", "t_cls", "s_plus", "visual_tokens"):
        torch.testing.assert_close(getattr(out, name), getattr(alone, name))
    torch.testing.assert_close(s_plus, mfi.s_plus(positives, of_positives))


def test_shapes_of_the_three_rows_of_table_3():
    f, t = features(2), torch.tensor([1, 2])
    visual = encoder(textual=False, tv_fusion=False)(f, t)
    assert visual.t_cls is None and visual.s_plus is None and visual.visual_tokens.shape == (2, 3, 20)
    textual = encoder(tv_fusion=False)(f, t)
    assert [s.shape for s in textual.s_plus] == [(2, 4, 2, 10), (2, 4, 2, 14)]
    assert textual.visual_tokens.shape == (2, 3, 20)
    assert encoder()(f, t).visual_tokens.shape == (2, 8, 20)


def test_tokens_of_an_image_differ_from_the_start():
    """Tokens that are alike give visual maps that are alike, and these have no gradient to part by."""
    torch.manual_seed(0)
    sizes = {"width": 128, "heads": 4, "depth": 4, "feature_width": 128, "visual_width": 128}
    code = (1024, 0.03, 2.0, 0)
    fresh = MFIEncoder(
        **sizes, feature_layers=3, visual_tokens=16, levels=7, text_tokens=1, text_widths=(128,), textual=True,
        tv_fusion=True, code=code,
    )  # fmt: skip
    with torch.no_grad():
        out = fresh(torch.randn(4, 3, 65, 128), torch.tensor([10, 400, 700, 999]))
    for tokens, most in ((out.v_tokens, 0.2), (out.s_plus[0][:, :, 0], 0.2), (out.visual_tokens, 0.98)):
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        cosines = unit @ unit.transpose(1, 2)
        count = cosines.shape[1]
        others = (cosines.sum(dim=(1, 2)) - count) / (count * (count - 1))
        assert others.mean() < most
