"""The scale of loaded LoRAs during a call: diffusers' `cross_attention_kwargs={"scale": s}`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from model.pipeline.checks import check_numbers, describe
from runtime.errors import ModelError


def lora_scale(cross_attention_kwargs: Any) -> float:
    """The `scale` in a call's `cross_attention_kwargs`, 1 by default. Raises ModelError for any other key."""
    given = {} if cross_attention_kwargs is None else cross_attention_kwargs
    if not isinstance(given, Mapping):
        raise ModelError(f"cross_attention_kwargs is {describe(given)}; give {{'scale': number}}, the scale of a LoRA")
    if unknown := [key for key in given if key != "scale"]:
        raise ModelError(
            f"cross_attention_kwargs has '{unknown[0]}'; only 'scale', the scale of a LoRA, can be given, as the"
            " adapter's own processors read the rest"
        )
    scale = given.get("scale", 1.0)
    check_numbers(whole={}, real={"the scale in cross_attention_kwargs": scale})
    return float(scale)


@contextmanager
def scaled_lora(models: Iterable[nn.Module], scale: float) -> Iterator[None]:
    """Inside, the active LoRAs of `models` count `scale` times; afterwards, also after an error, as much as before.

    Diffusers divides by the scale afterwards, and after a scale of 0 forgets the weights of `set_adapters`.
    """
    if scale == 1:  # also leaves what a callback sets with `set_adapters`
        yield
        return
    layers: list[Any] = [layer for model in models for layer in model.modules() if hasattr(layer, "scale_layer")]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(scale)
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
