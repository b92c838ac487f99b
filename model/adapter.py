"""All trained parameters as one module: the method's encoder, K' and V' of every cross-attention layer; files."""

from __future__ import annotations

import json
import tempfile
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
from model.card import About, model_card
from model.methods.base import AdapterOutput, DenoisingState
from model.methods.config import AdapterConfig
from model.methods.registry import METHODS, method_of
from model.repository import commit, fetch, split_name
from runtime.errors import ModelError
from runtime.files import refuse_pointers, write_json, write_text

FORMAT = 1
WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"
CARD, README = "card.json", "README.md"
"""Provenance, as training writes it, and the model card made from it; an adapter works without them."""


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
    """The method's encoder (`mfi`, whatever the method) + visual projections, of a method with a visual branch. Every
    parameter is trained; buffers are what is saved beside them, such as W of the Fourier code.

    Keys and values of the visual branch do not depend on what the UNet computes, so they are computed here, and a
    training step calls this module once: an engine that shards or gathers parameters around `forward` can wrap it.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.data_hash: str | None = None
        self.card: dict[str, Any] = {}
        """Contents of card.json."""
        self.source: str | None = None
        """`owner/name@commit` if it was fetched from the hub."""
        method = method_of(config)
        self.mfi = method.encoder(config)
        self.projections = nn.ModuleList(
            VisualProjection(config.visual_width, inner_width)
            for inner_width in (config.inner_widths if method.visual else ())
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
        for layer, projection in zip(layers[: len(adapter.projections)], adapter.projections, strict=True):
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
        keys, values = (None, None) if mfi.visual_tokens is None else self.project(mfi.visual_tokens)
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

    def save_pretrained(self, folder: str | Path, about: About | None = None, name: str | None = None) -> None:
        """`save`, with card.json and the model card README.md beside it: a folder to share.

        Args:
            about: licence, data, use and scores for the card; None: as in the card.json that it was loaded with.
            name: what the card says to load; None: the folder's name.
        """
        folder = Path(folder).expanduser()
        card = self.card | ({} if about is None else {"about": about.model_dump(mode="json", exclude_none=True)})
        text = model_card(self.config, card, name or folder.resolve().name, self.source)
        self.save(folder)
        self.card = card
        write_json(folder / CARD, card)
        write_text(folder / README, text)

    def push_to_hub(
        self,
        name: str,
        *,
        about: About | None = None,
        private: bool | None = None,
        branch: str | None = None,
        token: str | bool | None = None,
        message: str = "Upload adapter",
    ) -> str:
        """Commit what `save_pretrained` writes to repository `owner/name` of the hub, created if missing.

        Args:
            private: visibility of a new repository; None: the owner's default. A public one is refused if True.
            branch: created if missing; None: the default branch.
            token: of an account that may write there; None: HF_TOKEN, or that of `hf auth login`.

        Returns:
            `owner/name@commit`, which `from_pretrained` reads.

        Raises:
            ModelError: no such name, no access, or what the hub answered.
        """
        if (parts := split_name(name)) is None or parts[1] is not None:
            raise ModelError(f"{name}: is no name of a repository; give owner/name, and a branch with branch=")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, about, name)
            files = (DESCRIPTION, WEIGHTS, CARD, README)
            return f"{name}@{commit(name, Path(folder), files, message, private, branch, token)}"

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        base_model: str | None = None,
        base_revision: str | None = None,
    ) -> Self:
        """The adapter of a folder, or of a repository `owner/name` or `owner/name@revision` of the hub; see `load`.

        Args:
            revision: commit, tag or branch of the repository; None: the default branch. One that may move is logged
                with its commit.
            token: None: HF_TOKEN, or that of `hf auth login`.
            cache_dir: None: the hub's own cache.
            local_files_only: read from the cache alone.
            base_model: name of the loaded base model; see `load`.
            base_revision: its revision; see `load`.

        Raises:
            ModelError: as `load` and `locate`.
        """
        folder, name = locate(source, revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        try:
            adapter = cls.load(folder, base_model, base_revision)
        except ModelError as error:
            if name is None:
                raise
            raise ModelError(str(error).replace(str(folder), name)) from error  # the cache's path says less
        adapter.source = name
        return adapter

    @classmethod
    def load(cls, folder: Path, base_model: str | None = None, base_revision: str | None = None) -> Self:
        """The adapter saved in `folder`, on the CPU in its saved precision.

        Raises ModelError if it is incomplete, of another format, or was trained on a base model other than `base_model`
        (and `base_revision`; None is not compared).
        """
        config, data_hash = read_description(folder)
        require_base(config, base_model, base_revision, str(folder))
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
        adapter.card = read_card(folder)
        return adapter


def locate(
    source: str | Path,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[Path, str | None]:
    """(folder, name) of an adapter's files: a local folder has no name, one of the hub is `owner/name@commit`.

    Arguments as of `Adapter.from_pretrained`; a folder that exists takes precedence over a repository. Only the files
    of an adapter are fetched.

    Raises:
        ModelError: no such repository or revision, no access, offline and not in the cache, or no adapter in it.
    """
    folder = Path(source).expanduser()
    parts = None if folder.is_dir() else split_name(str(source))
    if parts is None:
        if revision is not None:
            raise ModelError(f"{source}: revision '{revision}' was given, but this is no repository; leave it out")
        return folder, None
    repository, written = parts
    if None not in (written, revision) and written != revision:
        raise ModelError(f"{source}: revision '{revision}' was given beside it; give one of the two")
    place, commit_id = fetch(
        repository, written or revision, (DESCRIPTION, WEIGHTS, CARD), token, cache_dir, local_files_only
    )
    name = f"{repository}@{commit_id}"
    if missing := [file for file in (DESCRIPTION, WEIGHTS) if not (place / file).is_file()]:
        raise ModelError(f"{name}: holds no adapter, as it has no {missing[0]}; give the repository of one")
    return place, name


def require_base(config: AdapterConfig, base_model: str | None, base_revision: str | None, where: str) -> None:
    """Raise ModelError naming `where` if an adapter was trained on another base model or revision; None is not
    compared."""
    for word, wanted, found in (
        ("base model", base_model, config.base_model),
        ("revision", base_revision, config.base_revision),
    ):
        if wanted is not None and found is not None and wanted != found:
            raise ModelError(
                f"{where}: the adapter was trained on {word} '{found}', but '{wanted}' is loaded; load '{found}', or"
                " train an adapter for this one"
            )


def read_card(folder: Path) -> dict[str, Any]:
    """Contents of card.json in `folder`, empty if there is none. Raises ModelError if it is not a JSON object."""
    path = folder / CARD
    if not path.is_file():
        return {}
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); correct or remove it") from error
    if not isinstance(card, dict):
        raise ModelError(f"{path}: is not a JSON object; correct or remove it")
    return card


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
