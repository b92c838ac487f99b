"""Configuration of an adapter, stored in `adapter.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.errors import ModelError


@dataclass(frozen=True)
class ScoringConfig:
    """RealCustom's scoring module; raises ModelError for values out of range."""

    width: int | None = None
    """Hidden width of the score networks; None: that of the image features [a reading]."""
    gain: float = 1.0
    """Features are scaled by 1 + gain * score, of scores that sum to 1 over n features: 1 as in the paper; n gives the
    score networks n times the gradient [a reading]."""
    fusion: Literal["schedule", "text", "visual", "mean", "none"] = "schedule"
    """How the scores of text and latents are combined: by noise level [paper], one of them, their mean, or no scores
    and all features (the paper's ablation)."""

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise ModelError(f"adapter: scoring.width is {self.width}; give at least 1, or null")
        if not self.gain > 0:
            raise ModelError(f"adapter: scoring.gain is {self.gain}; give more than 0")
        if self.fusion not in ("schedule", "text", "visual", "mean", "none"):
            raise ModelError(f"adapter: scoring.fusion is '{self.fusion}'; use schedule, text, visual, mean or none")


@dataclass(frozen=True)
class ProjectorConfig:
    """RealCustom++'s projector; raises ModelError for values out of range."""

    high: bool = True
    """Read the four high views."""
    shallow: bool = False
    """Read shallow layers for a second set of tokens; off in the published scripts."""
    head: int = 64
    """Width of an attention head."""

    def __post_init__(self) -> None:
        if self.head < 1:
            raise ModelError(f"adapter: projector.head is {self.head}; give at least 1")


@dataclass(frozen=True)
class FaceConfig:
    """DreamIdentity's face recogniser; raises ModelError for values out of range."""

    train: Literal["all", "projector"] = "all"
    """all: the adapter has a recogniser of its own and trains it [paper]; projector: it reads a frozen one."""
    scales: Literal["all", "last"] = "all"
    """Read the layers and the ID vector [paper], or the ID vector alone (the paper's ablation)."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The network's config.json."""
    identity_width: int = 0
    """Width e of the ID vector; 0: not known."""
    layers: tuple[int, ...] = ()
    """Its blocks that are read, 0-based."""
    pool: Literal["cls", "mean"] = "cls"
    """What is read of a block."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        for name, choices in (("train", ("all", "projector")), ("scales", ("all", "last")), ("pool", ("cls", "mean"))):
            if getattr(self, name) not in choices:
                raise ModelError(f"adapter: face.{name} is '{getattr(self, name)}'; use {' or '.join(choices)}")


@dataclass(frozen=True)
class WordsConfig:
    """DreamIdentity's pseudo-words S* in a caption; raises ModelError for values out of range."""

    place: Literal["replace", "after_noun"] = "replace"
    """In place of the class noun with its article, as a name is [paper], or after the noun, as in CustomContrast."""
    norm: Literal["none", "noun", "names"] = "none"
    """Their size: as learned; the noun's, as with `rescale`; or mean and spread of the token embeddings of names at the
    same position, as in StableIdentity."""
    start: float = 0.0
    """Share of the sampling steps, from the first on, that read the class noun alone, 0 to 1."""
    hidden: int | None = None
    """Width inside the MLP of a word; None: that of the text embedding [a reading]."""

    def __post_init__(self) -> None:
        for name, choices in (("place", ("replace", "after_noun")), ("norm", ("none", "noun", "names"))):
            if getattr(self, name) not in choices:
                raise ModelError(f"adapter: words.{name} is '{getattr(self, name)}'; use {', '.join(choices)}")
        if not 0 <= self.start <= 1:
            raise ModelError(f"adapter: words.start is {self.start}; give a share from 0 to 1")
        if self.hidden is not None and self.hidden < 1:
            raise ModelError(f"adapter: words.hidden is {self.hidden}; give at least 1, or null")


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes and switches of an adapter.

    The constructor raises ModelError for inconsistent sizes; `AdapterMethod.check` adds a method's own requirements.
    """

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
    encoder: Literal["mfi", "ip_adapter_plus", "realcustom", "realcustom_pp", "dreamidentity"] = "mfi"
    """Encoder of the image features, and with it the method: the MFI encoder, the baseline's resampler, RealCustom's
    scored features, RealCustom++'s projector, DreamIdentity's words; the first and the last have text tokens, and all
    but the last have visual ones."""
    width: int = 768
    """Width of the MFI encoder."""
    heads: int = 12
    """Attention heads of the MFI encoder."""
    depth: int = 4
    """Layers of each Q-Former [paper: 4]."""
    visual_tokens: int = 16
    """n_v, learned visual queries besides the CLS [a reading]."""
    text_tokens: int = 1
    """n_t, text tokens per level; DreamIdentity has one level for all layers."""
    textual: bool = True
    """Textual Q-Former and pseudo-word; off: row 0 of the paper's Table 3. DreamIdentity has nothing else."""
    tv_fusion: bool = True
    """TV fusion; off with `textual`: row 1 of Table 3."""
    visual_scope: Literal["all", "own"] = "all"
    """Refined visual tokens a layer sees: all of V~, or only its own level's. With a single token of its own,
    a layer's visual softmax is 1 everywhere, and K' learns nothing."""
    rescale: bool = True
    """Give S+ tokens the norm of the class noun's embedding [a reading, NeTI]."""
    noun_weight: float = 0.0
    """Weight of the class noun's embedding in its pseudo-word, S+ counting 1; 0: S+ alone [a reading]."""
    location_masks: bool = True
    """Whether calls of a pipeline that do not say otherwise use location masks: only where training made the attention
    maps locate the subject do they help."""
    fourier_pairs: int = 1024
    """Rows of W in the code of (t, l) (NeTI)."""
    fourier_sigma_t: float = 0.03
    """Standard deviation of W's timestep column (NeTI)."""
    fourier_sigma_l: float = 2.0
    """Standard deviation of W's level column (NeTI)."""
    fourier_seed: int = 0
    """Seed W is drawn from; W is saved as well."""
    latent_channels: int = 4
    """Channels of the UNet's latents, which RealCustom's scoring module reads."""
    scoring: ScoringConfig = ScoringConfig()
    """Of realcustom."""
    projector: ProjectorConfig = ProjectorConfig()
    """Of realcustom_pp."""
    face: FaceConfig = FaceConfig()
    """Of dreamidentity."""
    words: WordsConfig = WordsConfig()
    """Of dreamidentity."""

    def __post_init__(self) -> None:
        for name in ("feature_layers", "inner_widths", "levels", "text_widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        parts = {"scoring": ScoringConfig, "projector": ProjectorConfig, "face": FaceConfig, "words": WordsConfig}
        for name, kind in parts.items():
            if isinstance(given := getattr(self, name), Mapping):  # as read from JSON or params.yaml
                object.__setattr__(self, name, kind(**given))
        sizes = ("feature_width", "visual_width", "width", "heads", "depth", "visual_tokens", "text_tokens")
        for name in (*sizes, "fourier_pairs", "latent_channels"):
            if getattr(self, name) < 1:
                raise ModelError(f"adapter: {name} is {getattr(self, name)}; give at least 1")
        for name in ("feature_layers", "inner_widths", "text_widths"):
            if not getattr(self, name):
                raise ModelError(f"adapter: {name} is empty; give at least one")
        if self.width % self.heads:
            raise ModelError(f"adapter: {self.heads} heads do not divide width {self.width}; choose a divisor")
        if len(self.levels) != len(self.inner_widths):
            raise ModelError(
                f"adapter: {len(self.levels)} levels for {len(self.inner_widths)} cross-attention layers;"
                " give one per layer"
            )
        if set(self.levels) != set(range(self.level_count)):
            raise ModelError(f"adapter: levels {sorted(set(self.levels))} have gaps; number them from 0")

    @property
    def level_count(self) -> int:
        """L."""
        return max(self.levels, default=-1) + 1

    @property
    def writing(self) -> dict[str, Any]:
        """How captions are written with pseudo-words: arguments of `model.prompt.encode_captions`."""
        if self.encoder == "dreamidentity":
            return {"place": self.words.place, "rescale": self.words.norm == "noun"}
        return {"place": "after_noun", "rescale": self.rescale, "noun_weight": self.noun_weight}

    @property
    def encoder_sizes(self) -> dict[str, int]:
        """The sizes that every encoder takes, by the names of its arguments."""
        names = ("feature_width", "width", "heads", "depth", "visual_tokens", "visual_width")
        return {name: getattr(self, name) for name in names}
