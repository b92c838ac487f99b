"""Unfused attention for training on a CPU, where the fused kernel's backward pass takes most of a small step."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` without grouped queries, as three plain operations."""
    logits = (query * (scale or 1 / math.sqrt(query.shape[-1]))) @ key.transpose(-2, -1)
    if is_causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    if attn_mask is not None:
        attn_mask = attn_mask.to(logits.device)
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return F.dropout(logits.softmax(-1), dropout_p) @ value


@contextmanager
def plain_on_cpu(device: torch.device) -> Iterator[None]:
    """Inside, libraries' calls to fused attention use `plain_attention` if `device` is a CPU."""
    fused = F.scaled_dot_product_attention
    if device.type == "cpu":
        F.scaled_dot_product_attention = plain_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused
