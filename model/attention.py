"""Decoupled cross-attention (method, section 2; paper, equation 3) as diffusers attention processors.

The conditioning of a UNet call is passed as one `CrossAttentionContext` in `cross_attention_kwargs`, so that the UNet
keeps no state between calls and gradient checkpointing sees the same conditioning when it recomputes a block.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from einops import rearrange, repeat
from torch import Tensor

from runtime.errors import ModelError

Granularity = Literal["group", "layer"]


@dataclass(frozen=True)
class CrossAttentionLayer:
    """One attn2 of a UNet."""

    name: str
    """Path inside the UNet, e.g. `down_blocks.0.attentions.0.transformer_blocks.0.attn2`."""
    inner_width: int
    """Width of keys and values over all heads."""
    level: int
    """Which S+ token and caption it sees: its Transformer2D group, or itself with granularity `layer`."""


@dataclass
class AttentionMaps:
    """Attention maps of one layer as float32, before any location map, for the R rows with a subject; S subjects, m
    visual tokens."""

    text: Tensor | None
    """[R, S, heads, h, w] probability of the subject's placeholder, averaged over its n_t tokens."""
    visual: Tensor | None
    """[R, S, heads, m, h, w] probability of each visual token; the m maps sum to 1 at every pixel."""


@dataclass
class MapRecorder:
    """Collects the maps of layers with at most `max_pixels` pixels, and of self-attention with `self_pixels`."""

    max_pixels: int
    maps: dict[int, AttentionMaps] = field(default_factory=dict)
    self_pixels: int = 0
    """0: no self-attention."""
    self_maps: list[Tensor] = field(default_factory=list)
    """[R, N, N] of each of its layers with N = `self_pixels`, averaged over heads: rows are queries and sum to 1."""


@dataclass
class CrossAttentionContext:
    """Conditioning of one UNet call: B rows, L levels (or 1: the same caption for all), S subjects, n text positions.

    The first `bare` rows have no subject; `keys` to `recorder` describe the R = B - bare rows after them.
    """

    text: Tensor
    """[B, L, n, d] hidden states of the text encoder; layers of level l read [:, l]."""
    latent_size: tuple[int, int]
    """Height and width of the UNet's input, latent pixels."""
    keys: Sequence[Tensor] | None = None
    """One [R, S, m, inner width] per layer, K_v = V~ W'_k; None leaves the visual branch out."""
    values: Sequence[Tensor] | None = None
    """One [R, S, m, inner width] per layer, V_v = V~ W'_v."""
    strength: Tensor | float = 1.0
    """lambda; a number, or [R], one per row (0 = no subject)."""
    placeholder: Tensor | None = None
    """[R, S, n_t, n], 1 where the caption holds a token of the subject's placeholder, else 0."""
    location: Tensor | None = None
    """[R, S, h, w] in 0..1 on a grid of its own: multiplies the visual branch and the placeholder's text map."""
    recorder: MapRecorder | None = None
    levels: Sequence[int] | None = None
    """Level of each layer, those of the adapter that made this; None: those that the processors were installed with."""
    bare: int = 0
    """Number of leading unconditional rows; they skip the visual branch and all maps."""
    _locations: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    def text_of(self, level: int) -> Tensor:
        """[B, n, d] for a layer of this level."""
        return self.text[:, level if self.text.shape[1] > 1 else 0]

    def location_at(self, size: tuple[int, int]) -> Tensor | None:
        """[R, S, pixels] of the location map at a layer's size."""
        if self.location is None:
            return None
        if size not in self._locations:
            self._locations[size] = resized(self.location, size).flatten(start_dim=2)
        return self._locations[size]


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, S, h, w] at another size [B, S, *size]: as they are at their own, pooled where no side grows, else
    bilinear."""
    height, width = maps.shape[-2:]
    if (height, width) == size:
        return maps
    if height >= size[0] and width >= size[1]:
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def cross_attention_layers(unet: UNet2DConditionModel, granularity: Granularity = "group") -> list[CrossAttentionLayer]:
    """All attn2 of the UNet in order of execution (down, mid, up) with their levels.

    SD 1.5: 16 layers, 16 levels either way. SDXL: 70 layers in 11 groups; `granularity` chooses 11 or 70 levels.
    Raises ModelError for a UNet whose attn2 is not plain cross-attention.
    """
    layers: list[CrossAttentionLayer] = []
    groups: dict[str, int] = {}
    for part in ("down_blocks", "mid_block", "up_blocks"):
        block = getattr(unet, part)
        if block is None:
            continue
        for name, module in block.named_modules(prefix=part):
            if not name.endswith(".attn2") or not isinstance(module, Attention):
                continue
            if not module.is_cross_attention or module.residual_connection or module.norm_cross:
                raise ModelError(f"{name} is not plain cross-attention; use a UNet of the Stable Diffusion family")
            group = name.rpartition(".transformer_blocks")[0] if granularity == "group" else name
            level = groups.setdefault(group, len(groups))
            layers.append(CrossAttentionLayer(name, module.to_k.out_features, level))
    if not layers:
        raise ModelError("the UNet has no cross-attention; use a text-conditioned UNet2DConditionModel")
    return layers


PLAIN_PROCESSORS: tuple[type, ...] = (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
"""Diffusers' processors that compute plain attention, each in its own way."""


def install_processors(unet: UNet2DConditionModel, layers: Sequence[CrossAttentionLayer]) -> None:
    """Make every attn2 of `layers` read `cross_attention_kwargs={"conditioning": CrossAttentionContext}`.

    Without that argument the UNet's output is unchanged, bit for bit: the processors that were there are kept inside
    the new ones. Layers that have the new ones already, from this adapter or another, keep them.

    Raises ModelError, before anything is changed, for an IP-Adapter or other processors that change what attn2
    computes.
    """
    if unet.config.encoder_hid_dim_type == "ip_image_proj":
        raise ModelError("the UNet has an IP-Adapter; call unload_ip_adapter() on the pipeline that loaded it first")
    places = {f"{layer.name}.processor": (index, layer.level) for index, layer in enumerate(layers)}
    processors: dict[str, Any] = dict(unet.attn_processors)
    for name, found in unet.attn_processors.items():
        if name not in places:
            if type(found) in PLAIN_PROCESSORS:
                processors[name] = StockAttention(found)
        elif not isinstance(found, DecoupledCrossAttention):
            if type(found) not in PLAIN_PROCESSORS:
                raise ModelError(
                    f"{name} of the UNet is a {type(found).__name__}, which the adapter would replace; remove it first,"
                    " for example with unet.set_attn_processor(AttnProcessor2_0())"
                )
            processors[name] = DecoupledCrossAttention(*places[name], found)
    unet.set_attn_processor(processors)


def remove_processors(unet: UNet2DConditionModel) -> None:
    """Undo `install_processors`: the UNet gets back the processors that it had."""
    unet.set_attn_processor(
        {
            name: found.replaced if isinstance(found, StockAttention) else found
            for name, found in unet.attn_processors.items()
        }
    )


class StockAttention(AttnProcessor2_0):
    """Diffusers' own attention; accepts the `conditioning` argument, without diffusers' warning.

    Of it self-attention reads only a recorder that wants its maps; the output is unchanged.
    """

    def __init__(self, replaced: Any = None) -> None:
        """`replaced`: the processor that computes it; None: AttnProcessor2_0."""
        super().__init__()
        self.replaced: Any = AttnProcessor2_0() if replaced is None else replaced
        self.takes_temb = "temb" in inspect.signature(self.replaced.__call__).parameters

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        conditioning: CrossAttentionContext | None = None,
    ) -> Tensor:
        if conditioning is not None and encoder_hidden_states is None:
            record_self(attn, hidden_states, conditioning)
        more = {"temb": temb} if self.takes_temb else {}
        out: Tensor = self.replaced(
            attn,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **more,
        )
        return out


def record_self(attn: Attention, hidden_states: Tensor, context: CrossAttentionContext) -> None:
    """Record the maps of a self-attention layer with inputs [B, N, c], if the context's recorder wants that N."""
    if context.recorder is not None and hidden_states.shape[1] == context.recorder.self_pixels:
        rows = hidden_states[context.bare :]
        query, key = (_heads(part(rows), attn.heads) for part in (attn.to_q, attn.to_k))
        context.recorder.self_maps.append(attention_probabilities(query, key).mean(dim=1))


class DecoupledCrossAttention(StockAttention):
    """out = (softmax(Q K_t^T / sqrt(d)) V_t + lambda softmax(Q K_v^T / sqrt(d)) V_v) W_out, with K_v and V_v given.

    At inference, with location maps: the visual branch is multiplied by its subject's map, and so is the column of the
    text attention that belongs to the placeholder (method, section 4). Several subjects' visual branches are summed.
    """

    def __init__(self, index: int, level: int, replaced: Any = None) -> None:
        """`index`, `level`: the layer's number and level; `replaced`: as in `StockAttention`, used without context."""
        super().__init__(replaced)
        self.index, self.level = index, level

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        conditioning: CrossAttentionContext | None = None,
    ) -> Tensor:
        """hidden_states [B, pixels, c] -> the same shape."""
        context = conditioning
        if context is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        size = map_size(hidden_states.shape[1], context.latent_size)
        text = context.text_of(self.level if context.levels is None else context.levels[self.index])
        query, key, value = (
            _heads(part, attn.heads) for part in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        unconditional, rows = slice(context.bare), slice(context.bare, None)
        recording = context.recorder is not None and hidden_states.shape[1] <= context.recorder.max_pixels
        location = context.location_at(size)
        out, text_maps = text_branch(query[rows], key[rows], value[rows], context.placeholder, location, recording)
        visual_maps = None
        if context.keys is not None and context.values is not None:
            keys, values = (
                rearrange(part[self.index].to(query.dtype), "b s m (h d) -> b s h m d", h=attn.heads)
                for part in (context.keys, context.values)
            )
            visual, visual_maps = visual_branch(query[rows], keys, values, location, recording)
            strength = torch.as_tensor(context.strength, dtype=query.dtype, device=query.device)
            out = out + strength.reshape(-1, 1, 1, 1) * visual
        if context.bare:
            out = torch.cat(
                [F.scaled_dot_product_attention(query[unconditional], key[unconditional], value[unconditional]), out]
            )
        if recording and context.recorder is not None:
            context.recorder.maps[self.index] = AttentionMaps(
                None if text_maps is None else text_maps.unflatten(-1, size),
                None if visual_maps is None else rearrange(visual_maps, "b s n (h w) m -> b s n m h w", h=size[0]),
            )
        out = rearrange(out, "b h q d -> b q (h d)").to(query.dtype)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def text_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    placeholder: Tensor | None,
    location: Tensor | None,
    recording: bool,
) -> tuple[Tensor, Tensor | None]:
    """Text cross-attention: query [B, h, q, d], key and value [B, h, n, d] -> ([B, h, q, d], maps [B, S, h, q] or
    None).

    The columns of each subject's placeholder (`placeholder` [B, S, n_t, n]) are multiplied by `location` [B, S, q]
    after the softmax; rows are not renormalised: out + sum over placeholder tokens p of (location - 1) A_p v_p.
    """
    if placeholder is None or not (recording or location is not None):
        return F.scaled_dot_product_attention(query, key, value), None
    subjects, tokens = placeholder.shape[1:3]
    slots = placeholder.to(value).flatten(1, 2)[:, None]  # [B, 1, S n_t, n]
    out, columns = attention_with_columns(query, key, value, slots)
    maps = None
    if recording:
        of_each = rearrange(columns.float(), "b h q (s t) -> b s h q t", s=subjects)
        count = placeholder.to(of_each).sum(dim=(2, 3)).clamp_min(1)
        maps = of_each.sum(dim=-1) / count[..., None, None]
    if location is not None:
        excess = repeat(location.to(columns) - 1, "b s q -> b 1 q (s t)", t=tokens) * columns
        of_slots = slots @ value  # [B, h, S n_t, d]
        for slot in range(subjects * tokens):
            out = torch.addcmul(out, excess[..., slot : slot + 1], of_slots[:, :, slot : slot + 1])
    return out, maps


def attention_with_columns(query: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, and the columns of its probabilities that `slots` [B, 1, c, n] marks with ones -> [B, h, q, d],
    [B, h, q, c].

    The fused kernels return no probabilities, but A V contains them if columns of the identity matrix are appended to
    V; queries and keys are padded with as many zeros. A few columns thus cost a few more value channels, and A
    [B, h, q, n] is never materialised.
    """
    width, more = value.shape[-1], slots.shape[2]
    zeros = -(width + more) % 8 + more  # the kernels prefer multiples of eight
    value = torch.cat([value, F.pad(slots.mT, (0, zeros - more)).expand(-1, value.shape[1], -1, -1)], dim=-1)
    query, key = F.pad(query, (0, zeros)), F.pad(key, (0, zeros))
    out = F.scaled_dot_product_attention(query, key, value, scale=width**-0.5)
    return out[..., :width], out[..., width : width + more]


def visual_branch(
    query: Tensor, keys: Tensor, values: Tensor, location: Tensor | None, recording: bool
) -> tuple[Tensor, Tensor | None]:
    """Visual cross-attention summed over subjects: query [B, h, q, d], keys and values [B, S, h, m, d], location
    [B, S, q] -> ([B, h, q, d], maps [B, S, h, q, m] or None)."""
    maps = None
    if recording:
        maps = attention_probabilities(query[:, None], keys)
        out = maps.to(values.dtype) @ values
    else:
        subjects = keys.shape[1]
        queries = query[:, None].expand(-1, subjects, -1, -1, -1).flatten(0, 1)  # the fused kernels take four axes
        out = F.scaled_dot_product_attention(queries, keys.flatten(0, 1), values.flatten(0, 1))
        out = out.unflatten(0, (-1, subjects))
    if location is not None:
        out = out * location.to(out.dtype)[:, :, None, :, None]
    return out.sum(dim=1), maps


def attention_probabilities(query: Tensor, key: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) over the last axis in float32: [..., q, d] x [..., n, d] -> [..., q, n]."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.float().softmax(dim=-1)


def map_size(pixels: int, latent_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a layer with `pixels` queries: the UNet halves the latent, rounding up.

    Raises ModelError if no halving of `latent_size` has that many pixels.
    """
    height, width = latent_size
    while height * width > pixels and height * width > 1:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != pixels:
        raise ModelError(
            f"a cross-attention layer has {pixels} pixels, which is not a halving of the latent {latent_size[0]}x"
            f"{latent_size[1]}; pass the latent's actual size"
        )
    return height, width


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(x.shape[0], -1, heads, x.shape[-1] // heads).transpose(1, 2)
