"""Export W'_k and W'_v under the names of IP-Adapter's files (Ye et al. 2023), for code that reads those.

`customcontrast export --adapter FOLDER --out FILE.safetensors`
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from model.adapter import Adapter, VisualProjection
from model.attention import cross_attention_layers
from model.backbones.hub import reading, resolve
from model.backbones.variant import DiffusionSpec
from model.methods.config import AdapterConfig
from runtime.errors import ModelError

UNET_CONFIG = "unet/config.json"


def ip_adapter_state(adapter: Adapter, unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """`ip_adapter.{n}.to_k_ip.weight` and `.to_v_ip.weight` [inner width, visual width] of every cross-attention layer.

    On the CPU, in the adapter's precision. `unet` is the base model's, possibly without weights (on the meta
    device); n is that of `layer_numbers`. Only the projections: IP-Adapter's layout has no place for the encoder of the
    visual tokens. Raises ModelError if the adapter or IP-Adapter's layers do not fit the UNet.
    """
    config, unet_config = adapter.config, cast(Any, unet.config)
    if not adapter.projections:
        raise ModelError(
            f"the adapter's method '{config.encoder}' has no visual branch, and IP-Adapter's layout holds nothing else;"
            " load the adapter itself"
        )
    layers, numbers = cross_attention_layers(unet), layer_numbers(unet)
    widths = tuple(layer.inner_width for layer in layers)
    if widths != config.inner_widths:
        raise ModelError(
            f"the adapter has {len(config.inner_widths)} layers of widths {sorted(set(config.inner_widths))}, but the"
            f" UNet has {len(widths)} of {sorted(set(widths))}; pass base model '{config.base_model}'"
        )
    if config.visual_width != unet_config.cross_attention_dim:
        raise ModelError(
            f"the adapter's visual tokens have width {config.visual_width}, but IP-Adapter's have the UNet's"
            f" cross-attention width {unet_config.cross_attention_dim}; export an adapter of that visual_width"
        )
    state = {}
    for layer, projection in zip(layers, adapter.projections, strict=True):
        pair = cast(VisualProjection, projection)
        for name, linear in (("to_k_ip", pair.to_k), ("to_v_ip", pair.to_v)):
            weight = linear.weight.detach().cpu().contiguous()
            state[f"ip_adapter.{numbers[layer.name]}.{name}.weight"] = weight
    return state


def layer_numbers(unet: UNet2DConditionModel) -> dict[str, int]:
    """The number n of each attn2 in IP-Adapter's files, by its path in the UNet.

    n is its 0-based index in `unet.attn_processors`, which lists down, up, mid blocks, each with attn1 before attn2; an
    adapter lists down, mid, up, in order of execution. SD 1.5: 1, 3 .. 31, where 31 is the mid block.

    Raises ModelError for a UNet with other attention layers: for those, diffusers, which counts 1, 3, 5 .. over the
    attn2 alone, and IP-Adapter would disagree.
    """
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    odd = [name for place, name in enumerate(names) if not name.endswith(("attn1", "attn2")[place % 2])]
    if odd:
        raise ModelError(
            f"{odd[0]}: IP-Adapter's numbering needs blocks of attn1 and attn2; use a UNet with such blocks"
        )
    return {name: place for place, name in enumerate(names) if name.endswith("attn2")}


def base_unet(config: AdapterConfig, folder: Path | None = None) -> UNet2DConditionModel:
    """The base model's UNet without weights, on the meta device, from `unet/config.json` alone.

    `folder`: the base model in diffusers' layout; None: the path or hub id stored in the adapter. Raises ModelError if
    it is not found or cannot be read.
    """
    if folder is None:
        pinned = re.fullmatch("[0-9a-f]{40}", config.base_revision or "")
        try:
            spec = DiffusionSpec(path=config.base_model, revision=config.base_revision if pinned else None)
            folder = resolve(spec, [UNET_CONFIG])
        except ValueError as error:  # a ModelError, or a hub id without its commit
            raise ModelError(
                f"base model '{config.base_model}' was found neither locally nor on the hub, but its layer order is"
                " needed; pass its folder with --base-model"
            ) from error
    with reading(str(folder), f"a diffusers folder with {UNET_CONFIG}"):
        settings = json.loads((folder / UNET_CONFIG).read_text(encoding="utf-8"))
        with torch.device("meta"):
            return cast(Any, UNet2DConditionModel).from_config(settings)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--adapter", required=True, help="folder of a trained adapter, or owner/name@revision on the hub"
    )
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument(
        "--base-model", type=Path, help="diffusers folder of its base model (default: as stored in the adapter)"
    )


def main(options: argparse.Namespace) -> None:
    """Read the adapter, write the file, print a summary.

    Raises:
        ModelError: the name of the file, the adapter or its base model is unusable.
    """
    if options.out.suffix != ".safetensors":
        raise ModelError(f"--out {options.out} must end in .safetensors")
    adapter = Adapter.from_pretrained(options.adapter)
    state = ip_adapter_state(adapter, base_unet(adapter.config, options.base_model))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    part = options.out.with_name(f"{options.out.name}.part")
    save_file(state, part)
    part.replace(options.out)
    print(f"{options.out}: K' and V' of {len(state) // 2} layers, for base model '{adapter.config.base_model}'")
