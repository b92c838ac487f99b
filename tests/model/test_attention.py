"""Decoupled cross-attention against the formula in float64, layer orders of the real UNets, attention maps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from model.attention import (
    AttentionMaps,
    CrossAttentionContext,
    DecoupledCrossAttention,
    MapRecorder,
    cross_attention_layers,
    install_processors,
    map_size,
)
from model.location import location_map, min_max
from runtime.errors import ModelError
from tests.world.models import sd15_unet, sdxl_unet
from tests.world.models import unet as tiny_unet

BATCH, SUBJECTS, TEXT, TOKENS, HEADS, WIDTH, SIZE = 2, 2, 5, 3, 2, 8, (3, 4)


@pytest.fixture
def layer() -> Attention:
    torch.manual_seed(0)
    attention = Attention(query_dim=6, cross_attention_dim=7, heads=HEADS, dim_head=WIDTH // HEADS, out_bias=True)
    attention = attention.double().requires_grad_(False)
    attention.set_processor(DecoupledCrossAttention(index=0, level=1))
    return attention


def make_context(**changes) -> CrossAttentionContext:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    placeholder = torch.zeros(BATCH, SUBJECTS, 2, TEXT)
    placeholder[:, 0, 0, 1] = 1
    placeholder[:, 1, [0, 1], [3, 4]] = 1
    settings = {
        "text": random(BATCH, 2, TEXT, 7),
        "latent_size": SIZE,
        "keys": [random(BATCH, SUBJECTS, TOKENS, WIDTH)],
        "values": [random(BATCH, SUBJECTS, TOKENS, WIDTH)],
        "strength": torch.tensor([0.7, 1.3]),
        "placeholder": placeholder,
    }
    return CrossAttentionContext(**{**settings, **changes})


def written_out(layer: Attention, z: Tensor, context: CrossAttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    """Equation 3 pixel by pixel, with location maps -> output, text maps [B, S, h, q], visual maps [B, S, h, m, q]."""
    size, pixels = WIDTH // HEADS, z.shape[1]
    out = torch.zeros(BATCH, pixels, WIDTH).double()
    text_maps = torch.zeros(BATCH, SUBJECTS, HEADS, pixels).double()
    visual_maps = torch.zeros(BATCH, SUBJECTS, HEADS, TOKENS, pixels).double()
    for b in range(BATCH):
        c = context.text[b, 1]
        for h in range(HEADS):
            rows = slice(h * size, (h + 1) * size)
            for x in range(pixels):
                q = layer.to_q.weight[rows] @ z[b, x]
                a = torch.softmax(c @ layer.to_k.weight[rows].T @ q / size**0.5, dim=0)
                scaled = a.clone()
                for s in range(SUBJECTS):
                    mine = context.placeholder[b, s].sum(dim=0).bool()
                    text_maps[b, s, h, x] = a[mine].mean()
                    if context.location is not None:
                        scaled[mine] *= context.location[b, s].flatten()[x]
                out[b, x, rows] = scaled @ (c @ layer.to_v.weight[rows].T)
                for s in range(SUBJECTS):
                    k, v = context.keys[0][b, s][:, rows], context.values[0][b, s][:, rows]
                    share = torch.softmax(k @ q / size**0.5, dim=0)
                    visual_maps[b, s, h, :, x] = share
                    place = 1.0 if context.location is None else context.location[b, s].flatten()[x]
                    out[b, x, rows] += context.strength[b] * place * (share @ v)
    return out @ layer.to_out[0].weight.T + layer.to_out[0].bias, text_maps, visual_maps


@pytest.mark.parametrize("located", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_decoupled_attention_is_equation_3(layer, located, recorded):
    context = make_context()
    if located:
        context.location = torch.rand(BATCH, SUBJECTS, *SIZE).double()
    if recorded:
        context.recorder = MapRecorder(max_pixels=12)
    z = torch.randn(BATCH, 12, 6).double()
    expected, text_maps, visual_maps = written_out(layer, z, context)
    out = layer(z, encoder_hidden_states=context.text[:, 0], conditioning=context)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    if recorded:
        maps = context.recorder.maps[0]
        torch.testing.assert_close(maps.text.flatten(-2).double(), text_maps, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(maps.visual.flatten(-2).double(), visual_maps, rtol=1e-5, atol=1e-6)
        assert maps.text.shape[-2:] == SIZE


def test_strength_zero_and_no_visual_branch_are_the_text_branch_alone(layer):
    z = torch.randn(BATCH, 12, 6).double()
    bare = layer(z, conditioning=make_context(keys=None, values=None))
    assert torch.equal(layer(z, conditioning=make_context(strength=0.0)), bare)


@pytest.mark.parametrize("located", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_bare_rows_see_their_caption_alone_and_the_others_what_they_saw_without_them(layer, located, recorded):
    location = torch.rand(BATCH, SUBJECTS, *SIZE).double() if located else None
    recorders = [MapRecorder(max_pixels=12), MapRecorder(max_pixels=12)] if recorded else [None, None]
    context = make_context(location=location, recorder=recorders[0])
    z, other = torch.randn(BATCH, 12, 6).double(), torch.randn(1, 12, 6).double()
    alone = layer(z, conditioning=context)
    text = torch.cat([torch.randn(1, 2, TEXT, 7).double(), context.text])
    both = make_context(bare=1, text=text, location=location, recorder=recorders[1])
    out = layer(torch.cat([other, z]), conditioning=both)
    plain = CrossAttentionContext(text[:1], SIZE)
    torch.testing.assert_close(out[:1], layer(other, conditioning=plain), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[1:], alone, rtol=1e-12, atol=1e-12)
    if recorded:
        for name in ("text", "visual"):
            first, second = (getattr(recorder.maps[0], name) for recorder in recorders)
            torch.testing.assert_close(first, second)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), SIZE, (6, 8)])
def test_location_map_has_a_grid_of_its_own(layer, grid):
    z = torch.randn(BATCH, 12, 6).double()
    location = torch.rand(BATCH, SUBJECTS, *grid).double()
    if grid == (6, 8):
        small = location.reshape(BATCH, SUBJECTS, 3, 2, 4, 2).mean(dim=(3, 5))
    else:
        small = torch.nn.functional.interpolate(location, SIZE, mode="bilinear", align_corners=False)
    expected = layer(z, conditioning=make_context(location=small, placeholder=None))
    found = layer(z, conditioning=make_context(location=location, placeholder=None))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(found, expected) or grid != SIZE


def test_pixels_outside_the_location_have_the_bits_of_the_text_branch(layer):
    layer.float()
    z = torch.randn(BATCH, 12, 6)
    context = make_context(placeholder=None)
    parts = {name: [part.float() for part in getattr(context, name)] for name in ("keys", "values")}
    context.text, context.keys, context.values = context.text.float(), parts["keys"], parts["values"]
    context.location = (torch.rand(BATCH, 1, *SIZE) > 0.5).float().expand(-1, SUBJECTS, -1, -1)
    outside = context.location[:, 0].flatten(1) == 0
    found = layer(z, conditioning=context)
    alone = layer(z, conditioning=CrossAttentionContext(context.text, SIZE))
    assert torch.equal(found[outside], alone[outside])
    assert (found[~outside] != alone[~outside]).any(dim=-1).all()


def test_one_caption_serves_all_levels(layer):
    context = make_context(keys=None, values=None)
    z = torch.randn(BATCH, 12, 6).double()
    one = make_context(keys=None, values=None, text=context.text[:, 1:])
    assert torch.equal(layer(z, conditioning=context), layer(z, conditioning=one))


def test_larger_layers_are_not_recorded(layer):
    context = make_context(recorder=MapRecorder(max_pixels=11))
    layer(torch.randn(BATCH, 12, 6).double(), conditioning=context)
    assert not context.recorder.maps


def test_without_conditioning_the_unet_computes_what_it_did_before():
    torch.manual_seed(0)
    network = tiny_unet(20).eval()
    z, text = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 20)
    before = network(z, 7, text).sample
    install_processors(network, cross_attention_layers(network))
    assert torch.equal(network(z, 7, text).sample, before)
    context = CrossAttentionContext(text[:, None], (8, 8))
    assert torch.equal(network(z, 7, text, cross_attention_kwargs={"conditioning": context}).sample, before)


def test_self_attention_is_recorded_and_its_output_left_as_it_was():
    torch.manual_seed(0)
    network = tiny_unet(20).eval()
    install_processors(network, cross_attention_layers(network))
    z, text = torch.randn(3, 4, 8, 8), torch.randn(3, 6, 20)
    recorder = MapRecorder(0, self_pixels=16)
    inputs = []
    attention = network.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        before = network(z, 7, text).sample
        context = CrossAttentionContext(text[:, None], (8, 8), recorder=recorder, bare=1)
        assert torch.equal(network(z, 7, text, cross_attention_kwargs={"conditioning": context}).sample, before)
        query, key = (
            layer(inputs[1][1:]).unflatten(-1, (attention.heads, -1)).double()
            for layer in (attention.to_q, attention.to_k)
        )
    assert not recorder.maps and all(maps.shape == (2, 16, 16) for maps in recorder.self_maps)
    expected = torch.zeros(2, 16, 16).double()
    for head in range(attention.heads):
        scores = query[:, :, head] @ key[:, :, head].mT / query.shape[-1] ** 0.5
        expected += scores.softmax(dim=-1) / attention.heads
    assert any(torch.allclose(maps.double(), expected, atol=1e-6) for maps in recorder.self_maps)


def test_conditioning_gives_no_warning(caplog):
    network = tiny_unet(20).eval()
    install_processors(network, cross_attention_layers(network))
    text = torch.randn(1, 1, 6, 20)
    context = CrossAttentionContext(text, (8, 8))
    network(torch.randn(1, 4, 8, 8), 7, text[:, 0], cross_attention_kwargs={"conditioning": context})
    assert not caplog.records


def test_layers_are_numbered_in_the_order_they_run():
    network = tiny_unet(20).eval()
    layers = cross_attention_layers(network)
    ran: list[str] = []
    for layer in layers:
        network.get_submodule(layer.name).register_forward_hook(lambda m, i, o, name=layer.name: ran.append(name))
    network(torch.randn(1, 4, 8, 8), 7, torch.randn(1, 6, 20))
    assert ran == [layer.name for layer in layers]


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_gradient_checkpointing_changes_neither_output_nor_gradient(size):
    torch.manual_seed(0)
    network = tiny_unet(20).requires_grad_(False).train()
    layers = cross_attention_layers(network)
    install_processors(network, layers)
    text, z = torch.randn(1, layers[-1].level + 1, 6, 20), torch.randn(1, 4, *size)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            network.enable_gradient_checkpointing()
        keys = [torch.linspace(-1, 1, 2 * layer.inner_width).reshape(1, 1, 2, -1) for layer in layers]
        keys = [key.requires_grad_() for key in keys]
        placeholder = torch.eye(6)[[2]][None, None]
        context = CrossAttentionContext(text, size, keys, keys, placeholder=placeholder, recorder=MapRecorder(100))
        out = network(z, 7, text[:, 0], cross_attention_kwargs={"conditioning": context}).sample
        maps = sum(maps.visual.var() + maps.text.var() for maps in context.recorder.maps.values())
        (out.square().mean() + maps).backward()
        found.append((out, *(key.grad for key in keys)))
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_stable_diffusion_15_has_16_layers():
    with torch.device("meta"):
        network = sd15_unet()
    layers = cross_attention_layers(network)
    assert [layer.level for layer in layers] == list(range(16))
    assert [layer.inner_width for layer in layers] == [320] * 2 + [640] * 2 + [1280] * 6 + [640] * 3 + [320] * 3
    assert layers[6].name.startswith("mid_block")


def test_sdxl_has_70_layers_in_11_groups():
    with torch.device("meta"):
        network = sdxl_unet()
    layers = cross_attention_layers(network)
    assert len(layers) == 70 and max(layer.level for layer in layers) == 10
    counts = [sum(layer.level == level for layer in layers) for level in range(11)]
    assert counts == [2, 2, 10, 10, 10, 10, 10, 10, 2, 2, 2]
    assert [layer.level for layer in cross_attention_layers(network, "layer")] == list(range(70))


def test_unet_without_text_is_one_sentence():
    bare = SimpleNamespace(down_blocks=torch.nn.Module(), mid_block=None, up_blocks=torch.nn.Module())
    with pytest.raises(ModelError, match="no cross-attention; use"):
        cross_attention_layers(bare)  # type: ignore[arg-type]


def test_map_size_halves_and_rounds_up():
    assert [map_size(n, (7, 10)) for n in (70, 20, 6, 2, 1)] == [(7, 10), (4, 5), (2, 3), (1, 2), (1, 1)]
    with pytest.raises(ModelError, match="64 pixels, which is not a halving of the latent 6x6"):
        map_size(64, (6, 6))


def test_location_map_follows_the_subject():
    subject = torch.zeros(8, 8)
    subject[2:6, 2:6] = 1
    noise = torch.rand(1, 1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    logits = torch.cat([2 * subject.expand(1, 1, 2, 3, 8, 8), torch.zeros(1, 1, 2, 1, 8, 8)], dim=3)
    visual = (logits + noise).softmax(dim=3)
    small = torch.nn.functional.avg_pool2d(subject[None], 2).expand(1, 1, 2, 4, 4)
    found = location_map([AttentionMaps(0.1 + 0.2 * small, None), AttentionMaps(None, visual)], (8, 8))
    assert found.shape == (1, 1, 8, 8)
    assert found[0, 0][subject == 1].mean() > 0.7 and found[0, 0][subject == 0].mean() < 0.2
    assert found.min() == 0 and found.max() == 1


def test_location_map_is_its_recipe_step_by_step():
    text = torch.rand(1, 1, 2, 4, 4)
    found = location_map([AttentionMaps(text, None)], (4, 4))[0, 0]
    mean = text[0, 0].mean(dim=0)
    mean = (mean - mean.min()) / (mean.max() - mean.min())
    mean[mean < 0.2] = 0
    torch.testing.assert_close(found, (mean - mean.min()) / (mean.max() - mean.min()))


def test_flat_map_means_everywhere_and_no_map_means_none():
    assert torch.equal(min_max(torch.full((1, 4, 4), 0.3)), torch.ones(1, 4, 4))
    assert location_map([], (4, 4)) is None
