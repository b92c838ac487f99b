"""All trained parameters as one module: the method's encoder, K' and V' of every cross-attention layer; files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.attention import CrossAttentionLayer, Granularity, cross_attention_layers, install_processors
from model.methods.base import AdapterOutput, DenoisingState
from model.methods.config import AdapterConfig
from model.methods.registry import METHODS, method_of
from runtime.errors import ModelError
from runtime.files import refuse_pointers

FORMAT = 1
WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"


class VisualProjection(nn.Module):
    """W'_k and W'_v of one cross-attention layer."""

    def __init__(self, visual_width: int, inner_width: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(visual_width, inner_width, bias=False)
        self.to_v = nn.Linear(visual_width, inner_width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, m, visual width] -> keys, values, each [B, m, inner width]."""
        tokens = tokens.to(self.to_k.weight.dtype)
        return self.to_k(tokens), self.to_v(tokens)


class Adapter(nn.Module):
    """The method's encoder (`mfi`, whatever the method) + visual projections. Every parameter is trained; the only
    buffer is W of the Fourier code.

    Keys and values of the visual branch do not depend on what the UNet computes, so they are computed here, and a
    training step calls this module once: an engine that shards or gathers parameters around `forward` can wrap it.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.data_hash: str | None = None
        self.mfi = method_of(config).encoder(config)
        self.projections = nn.ModuleList(
            VisualProjection(config.visual_width, inner_width) for inner_width in config.inner_widths
        )

    @classmethod
    def for_unet(
        cls,
        unet: UNet2DConditionModel,
        *,
        base_model: str,
        base_revision: str | None,
        image_encoder: str,
        feature_layers: Sequence[int],
        feature_width: int,
        text_widths: Sequence[int],
        granularity: Granularity = "group",
        **sizes: Any,
    ) -> Self:
        """A new adapter that fits `unet`, with K' and V' copied from its W_k and W_v where the widths match.

        `granularity`: one level per Transformer2D `group` or per attention `layer` (SDXL 11 or 70, SD 1.5 16 either
        way). `sizes`: the other fields of AdapterConfig. The UNet itself is not changed; see `install`.
        """
        layers = cross_attention_layers(unet, granularity)
        unet_config: Any = unet.config
        method = METHODS.get(sizes.get("encoder", "mfi"))
        of_features = method is not None and method.scales_features
        config = AdapterConfig(
            base_model=base_model,
            base_revision=base_revision,
            image_encoder=image_encoder,
            feature_layers=tuple(feature_layers),
            feature_width=feature_width,
            inner_widths=tuple(layer.inner_width for layer in layers),
            levels=tuple(layer.level for layer in layers),
            text_widths=tuple(text_widths),
            latent_channels=unet_config.in_channels,
            **{"visual_width": feature_width if of_features else unet_config.cross_attention_dim, **sizes},
        )
        adapter = cls(config)
        for layer, projection in zip(layers, adapter.projections, strict=True):
            attention = unet.get_submodule(layer.name)
            for name in ("to_k", "to_v"):
                frozen, trained = getattr(attention, name).weight, getattr(projection, name).weight
                if frozen.shape == trained.shape:
                    with torch.no_grad():
                        trained.copy_(frozen)
        return adapter

    def forward(
        self,
        reference: Tensor,
        timesteps: Tensor,
        positive: Tensor | None = None,
        positive_timesteps: Tensor | None = None,
        state: DenoisingState | None = None,
    ) -> AdapterOutput:
        """reference, positive [B, K, N, d], timesteps [B] -> AdapterOutput; `positive_timesteps` defaults to
        `timesteps`. `state` is handed to the encoders that read it."""
        positive_s_plus = None
        if state is not None:
            mfi = self.mfi(reference, timesteps, state)
        elif positive is None:
            mfi = self.mfi(reference, timesteps)
        else:
            encoder: Any = self.mfi
            of_positives = timesteps if positive_timesteps is None else positive_timesteps
            mfi, positive_s_plus = encoder.with_positives(reference, timesteps, positive, of_positives)
        keys, values = self.project(mfi.visual_tokens)
        return AdapterOutput(mfi, positive_s_plus, keys, values)

    def s_plus(self, features: Tensor, timesteps: Tensor) -> tuple[Tensor, ...]:
        """S+ only, [B, L, n_t, d_text] per text encoder, of features [B, K, N, d] at timesteps [B]; needs `textual`."""
        encoder: Any = self.mfi
        found: tuple[Tensor, ...] = encoder.s_plus(features, timesteps)
        return found

    def project(self, visual_tokens: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """visual tokens [B, m, visual width] -> keys and values per cross-attention layer, each [B, m, inner width].

        With `visual_scope: own` m is n_t, the tokens of the layer's own level.
        """
        pairs = []
        for level, projection in zip(self.config.levels, self.projections, strict=True):
            tokens = visual_tokens
            if self.config.visual_scope == "own":
                tokens = visual_tokens[:, level * self.config.text_tokens : (level + 1) * self.config.text_tokens]
            pairs.append(projection(tokens))
        keys, values = zip(*pairs, strict=True)
        return keys, values

    @property
    def device(self) -> torch.device:
        """Device of the parameters; diffusers queries it on a pipeline's components."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters."""
        return next(self.parameters()).dtype

    def install(self, unet: UNet2DConditionModel) -> None:
        """Install the decoupled processors in `unet`, where they are not yet; several adapters may share a UNet.

        Raises ModelError, before anything is changed, if its layers do not match the config, or if it has an IP-Adapter
        or other processors that change what cross-attention computes.
        """
        found = cross_attention_layers(unet)
        widths = tuple(layer.inner_width for layer in found)
        if widths != self.config.inner_widths:
            raise ModelError(
                f"the adapter has {len(self.config.inner_widths)} cross-attention layers of widths"
                f" {sorted(set(self.config.inner_widths))}, but the UNet has {len(widths)} of {sorted(set(widths))};"
                f" load base model '{self.config.base_model}'"
            )
        layers = [
            CrossAttentionLayer(layer.name, layer.inner_width, level)
            for layer, level in zip(found, self.config.levels, strict=True)
        ]
        install_processors(unet, layers)

    def save(self, folder: Path, data_hash: str | None = None) -> None:
        """Write `adapter.safetensors` (parameters and W) and `adapter.json` (config, base model, data hash, format).

        Each file is written under a temporary name and renamed, the description last: it marks a complete adapter.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DESCRIPTION).unlink(missing_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / f"{WEIGHTS}.part")
        (folder / f"{WEIGHTS}.part").replace(folder / WEIGHTS)
        self.data_hash = data_hash or self.data_hash
        description = {"format": FORMAT, "data_hash": self.data_hash, "config": asdict(self.config)}
        (folder / f"{DESCRIPTION}.part").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        (folder / f"{DESCRIPTION}.part").replace(folder / DESCRIPTION)

    @classmethod
    def load(cls, folder: Path, base_model: str | None = None, base_revision: str | None = None) -> Self:
        """The adapter saved in `folder`, on the CPU in its saved precision.

        Raises ModelError if it is incomplete, of another format, or was trained on a base model other than `base_model`
        (and `base_revision`; None is not compared).
        """
        config, data_hash = read_description(folder)
        for word, wanted, found in (
            ("base model", base_model, config.base_model),
            ("revision", base_revision, config.base_revision),
        ):
            if wanted is not None and found is not None and wanted != found:
                raise ModelError(
                    f"{folder}: the adapter was trained on {word} '{found}', but '{wanted}' is loaded; load '{found}',"
                    " or train an adapter for this one"
                )
        path = folder / WEIGHTS
        refuse_pointers([path])
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: cannot be read as safetensors ({error}); export the adapter again") from error
        adapter = cls(config)
        try:
            # assign keeps the saved precision.
            adapter.load_state_dict(state, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip().rstrip(".")
            raise ModelError(
                f"{path}: does not match the {DESCRIPTION} beside it ({reason}); export both again"
            ) from error
        adapter.requires_grad_(True)
        adapter.data_hash = data_hash
        return adapter


def read_description(folder: Path) -> tuple[AdapterConfig, str | None]:
    """(config, data hash) of `adapter.json` in `folder`, without the weights. Raises ModelError naming file and key."""
    path = folder / DESCRIPTION
    refuse_pointers([path])
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version, raw, data_hash = description["format"], description["config"], description["data_hash"]
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}; pass the folder of a trained adapter") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: is not an adapter description ({error}); export the adapter again") from error
    if version != FORMAT:
        raise ModelError(f"{path}: format is {version}, expected {FORMAT}; export the adapter again with this version")
    known = {field.name for field in fields(AdapterConfig)}
    if unknown := set(raw) - known:
        raise ModelError(f"{path}: unknown key 'config.{min(unknown)}'; export the adapter again with this version")
    try:
        return AdapterConfig(**raw), data_hash
    except TypeError as error:
        raise ModelError(f"{path}: is incomplete ({error}); export the adapter again") from error
