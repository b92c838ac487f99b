"""All that is trained, as one module: the MFI encoder and K', V' of every cross-attention layer; saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.attention import CrossAttentionLayer, Granularity, cross_attention_layers, install_processors
from model.errors import ModelError
from model.ip_adapter import IPAdapterPlusEncoder
from model.mfi import MFIEncoder, MFIOutput

FORMAT = 1
WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes and switches of an adapter. The constructor raises ModelError for sizes that do not fit each other."""

    base_model: str
    """Name of the base model it was trained on (`Diffusion.name`)."""
    base_revision: str | None
    """Its revision (`Diffusion.revision`)."""
    image_encoder: str
    """Name of the frozen image encoder (`Clip.name`)."""
    feature_layers: tuple[int, ...]
    """Which K hidden states of the image encoder are read; negative ones count from the end."""
    feature_width: int
    """Width d of a hidden state."""
    inner_widths: tuple[int, ...]
    """Columns of keys and values of each cross-attention layer, in order of execution."""
    levels: tuple[int, ...]
    """Level of each cross-attention layer: which S+ token it sees; 0..L-1, each used."""
    visual_width: int
    """Width of the visual tokens: the UNet's cross-attention width, so that K', V' start from W_k, W_v."""
    text_widths: tuple[int, ...]
    """Embedding width of each text encoder: one (SD 1.5) or two (SDXL)."""
    encoder: Literal["mfi", "ip_adapter_plus"] = "mfi"
    """What reads the image features: the MFI encoder, or the baseline's resampler, which has no text tokens."""
    width: int = 768
    """Width of the MFI encoder."""
    heads: int = 12
    """Attention heads of the MFI encoder."""
    depth: int = 4
    """Layers of each Q-Former [paper: 4]."""
    visual_tokens: int = 16
    """n_v, learned visual queries besides the CLS [a reading]."""
    text_tokens: int = 1
    """n_t, text tokens a level."""
    textual: bool = True
    """Textual Q-Former and pseudo-word; off: row 0 of the paper's Table 3."""
    tv_fusion: bool = True
    """TV fusion; off with `textual`: row 1 of Table 3."""
    visual_scope: Literal["all", "own"] = "all"
    """Refined visual tokens a layer sees: all of V~, or only its own level's. With one token of its own a layer's
    visual softmax is 1 everywhere, and K' learns nothing."""
    rescale: bool = True
    """Give S+ tokens the norm of the class noun's embedding [a reading, NeTI]."""
    fourier_pairs: int = 1024
    """Rows of W in the code of (t, l) (NeTI)."""
    fourier_sigma_t: float = 0.03
    """Standard deviation of W's timestep column (NeTI)."""
    fourier_sigma_l: float = 2.0
    """Standard deviation of W's level column (NeTI)."""
    fourier_seed: int = 0
    """Seed W is drawn from; W is saved as well."""

    def __post_init__(self) -> None:
        for name in ("feature_layers", "inner_widths", "levels", "text_widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = ("feature_width", "visual_width", "width", "heads", "depth", "visual_tokens", "text_tokens")
        for name in (*sizes, "fourier_pairs"):
            if getattr(self, name) < 1:
                raise ModelError(f"adapter: {name} is {getattr(self, name)}; give at least 1")
        for name in ("feature_layers", "inner_widths", "text_widths"):
            if not getattr(self, name):
                raise ModelError(f"adapter: {name} is empty; name at least one")
        if self.width % self.heads:
            raise ModelError(f"adapter: {self.heads} heads do not divide width {self.width}; choose a divisor")
        if len(self.levels) != len(self.inner_widths):
            raise ModelError(
                f"adapter: {len(self.levels)} levels for {len(self.inner_widths)} cross-attention layers;"
                " give one a layer"
            )
        if set(self.levels) != set(range(self.level_count)):
            raise ModelError(f"adapter: levels {sorted(set(self.levels))} have gaps; number them from 0")
        if self.encoder not in ("mfi", "ip_adapter_plus"):
            raise ModelError(f"adapter: encoder is '{self.encoder}'; use mfi or ip_adapter_plus")
        if self.encoder == "ip_adapter_plus" and self.textual:
            raise ModelError("adapter: ip_adapter_plus has no textual Q-Former; set textual and tv_fusion to false")
        if self.tv_fusion and not self.textual:
            raise ModelError("adapter: tv_fusion needs the textual Q-Former; set textual too, or tv_fusion to false")
        if self.visual_scope not in ("all", "own"):
            raise ModelError(f"adapter: visual_scope is '{self.visual_scope}'; use all or own")
        if self.visual_scope == "own" and not self.tv_fusion:
            raise ModelError("adapter: visual_scope own needs tv_fusion; only refined visual tokens belong to a layer")

    @property
    def level_count(self) -> int:
        """L."""
        return max(self.levels, default=-1) + 1


@dataclass(frozen=True)
class AdapterOutput:
    """One training step's use of the adapter: everything the trained parameters do."""

    mfi: MFIOutput
    """Of the references, one timestep each."""
    positive_s_plus: tuple[Tensor, ...] | None
    """S+ of the positives, [B, L, n_t, d_text] per text encoder; None where none were given."""
    keys: tuple[Tensor, ...]
    """K_v = V~ W'_k per cross-attention layer, [B, m, inner width]."""
    values: tuple[Tensor, ...]
    """V_v = V~ W'_v per cross-attention layer, [B, m, inner width]."""


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
    """MFI encoder + visual projections. Every parameter is trained; the one buffer is W of the Fourier code.

    Keys and values of the visual branch do not depend on the UNet's state, so they are made here, and a training step
    calls this module once: it may be wrapped by an engine that shards or gathers parameters around `forward`.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.data_hash: str | None = None
        self.mfi = encoder_of(config)
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
        """A new adapter that fits `unet`, K' and V' copied from its W_k and W_v where the widths agree.

        `granularity`: one level per Transformer2D `group` or per attention `layer` (SDXL 11 or 70, SD 1.5 16 either
        way). `sizes`: the other fields of AdapterConfig.  The UNet itself is not changed; see `install`.
        """
        layers = cross_attention_layers(unet, granularity)
        unet_config: Any = unet.config
        config = AdapterConfig(
            base_model=base_model,
            base_revision=base_revision,
            image_encoder=image_encoder,
            feature_layers=tuple(feature_layers),
            feature_width=feature_width,
            inner_widths=tuple(layer.inner_width for layer in layers),
            levels=tuple(layer.level for layer in layers),
            text_widths=tuple(text_widths),
            **{"visual_width": unet_config.cross_attention_dim, **sizes},
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
    ) -> AdapterOutput:
        """reference, positive [B, K, N, d], timesteps [B] -> AdapterOutput. The positives' timesteps default to the
        same."""
        mfi = self.mfi(reference, timesteps)
        positive_s_plus = None
        if positive is not None:
            positive_s_plus = self.s_plus(positive, timesteps if positive_timesteps is None else positive_timesteps)
        keys, values = self.project(mfi.visual_tokens)
        return AdapterOutput(mfi, positive_s_plus, keys, values)

    def s_plus(self, features: Tensor, timesteps: Tensor) -> tuple[Tensor, ...]:
        """S+ alone, [B, L, n_t, d_text] per text encoder, of features [B, K, N, d] at timesteps [B]; `textual` only."""
        assert isinstance(self.mfi, MFIEncoder)  # the baseline has no S+
        return self.mfi.s_plus(features, timesteps)

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
        """Where the parameters are; diffusers asks it of a pipeline's parts."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters."""
        return next(self.parameters()).dtype

    def install(self, unet: UNet2DConditionModel) -> None:
        """Put the decoupled processors into `unet`. Raises ModelError where its layers are not those of the config."""
        found = cross_attention_layers(unet)
        widths = tuple(layer.inner_width for layer in found)
        if widths != self.config.inner_widths:
            raise ModelError(
                f"the adapter was made for {len(self.config.inner_widths)} cross-attention layers of widths"
                f" {sorted(set(self.config.inner_widths))} and the UNet has {len(widths)} of {sorted(set(widths))};"
                f" load base model '{self.config.base_model}'"
            )
        layers = [
            CrossAttentionLayer(layer.name, layer.inner_width, level)
            for layer, level in zip(found, self.config.levels, strict=True)
        ]
        install_processors(unet, layers)

    def save(self, folder: Path, data_hash: str | None = None) -> None:
        """Write `adapter.safetensors` (parameters and W) and `adapter.json` (config, base model, data hash, format).

        Each file is written beside its place and renamed, the description last: it stands for a complete adapter.
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
        """The adapter saved in `folder`, on the CPU in the precision it was saved in.

        Raises ModelError where it is incomplete, of another format, or was trained on another base model than
        `base_model` (and `base_revision`; None is not compared).
        """
        config, data_hash = read_description(folder)
        for word, wanted, found in (
            ("base model", base_model, config.base_model),
            ("revision", base_revision, config.base_revision),
        ):
            if wanted is not None and found is not None and wanted != found:
                raise ModelError(
                    f"{folder}: the adapter was trained on {word} '{found}' and '{wanted}' is loaded; load '{found}',"
                    " or train an adapter for this one"
                )
        path = folder / WEIGHTS
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
            raise ModelError(f"{path}: does not fit {DESCRIPTION} beside it ({reason}); export both again") from error
        adapter.requires_grad_(True)
        adapter.data_hash = data_hash
        return adapter


def encoder_of(config: AdapterConfig) -> MFIEncoder | IPAdapterPlusEncoder:
    """The module between the image features and the tokens, with new weights."""
    sizes: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("feature_width", "width", "heads", "depth", "visual_tokens", "visual_width")
    }
    if config.encoder == "ip_adapter_plus":
        return IPAdapterPlusEncoder(**sizes)
    return MFIEncoder(
        **sizes,
        feature_layers=len(config.feature_layers),
        levels=config.level_count,
        text_tokens=config.text_tokens,
        text_widths=config.text_widths,
        textual=config.textual,
        tv_fusion=config.tv_fusion,
        code=(config.fourier_pairs, config.fourier_sigma_t, config.fourier_sigma_l, config.fourier_seed),
    )


def read_description(folder: Path) -> tuple[AdapterConfig, str | None]:
    """(config, data hash) of `adapter.json` in `folder`, without the weights.  Raises ModelError that names file and
    key."""
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version, raw, data_hash = description["format"], description["config"], description["data_hash"]
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}; name the folder of a trained adapter") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: is no adapter description ({error}); export the adapter again") from error
    if version != FORMAT:
        raise ModelError(f"{path}: format {version} is not {FORMAT}; export the adapter again with this version")
    known = {field.name for field in fields(AdapterConfig)}
    if unknown := set(raw) - known:
        raise ModelError(f"{path}: unknown key 'config.{min(unknown)}'; export the adapter again with this version")
    try:
        return AdapterConfig(**raw), data_hash
    except TypeError as error:
        raise ModelError(f"{path}: is incomplete ({error}); export the adapter again") from error
