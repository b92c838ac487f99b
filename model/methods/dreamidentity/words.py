"""From what a face recogniser sees to the words S* of a person (DreamIdentity).

Axes: B photos, k words, d_text the width of a text encoder's token embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.backbones.features.face import PIXELS, FaceRecogniser
from model.methods.base import EncoderOutput
from model.methods.config import AdapterConfig
from model.prompt import token_ids
from runtime.errors import ModelError


class WordMLP(nn.Sequential):
    """LayerNorm, Linear, GELU, Linear [a reading]."""

    def __init__(self, columns: int, text_width: int, hidden: int | None = None) -> None:
        """`hidden`: width inside; None: that of the text embedding."""
        inside = hidden or text_width
        super().__init__(nn.LayerNorm(columns), nn.Linear(columns, inside), nn.GELU(), nn.Linear(inside, text_width))


class WordProjector(nn.Module):
    """s_i = MLP_i(v): an MLP for each word, each of which reads the whole of v, and a set of them for each text
    encoder."""

    def __init__(self, columns: int, words: int, text_widths: Sequence[int], hidden: int | None = None) -> None:
        """`columns` of v, number of `words`, width of each text encoder's embeddings, width inside the MLPs."""
        super().__init__()
        self.sets = nn.ModuleList(
            nn.ModuleList(WordMLP(columns, width, hidden) for _ in range(words)) for width in text_widths
        )

    def forward(self, v: Tensor) -> tuple[Tensor, ...]:
        """v [B, columns] -> S* [B, k, d_text] per text encoder."""
        sets: Any = self.sets
        return tuple(torch.stack([mlp(v) for mlp in mlps], dim=1) for mlps in sets)


class NameStatistics(nn.Module):
    """Mean and spread of names' token embeddings at each position, which S* takes (AdaIN, as in StableIdentity)."""

    mean: Tensor
    std: Tensor

    def __init__(self, words: int, text_width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(words, text_width))
        self.register_buffer("std", torch.ones(words, text_width))

    def forward(self, s: Tensor) -> Tensor:
        """S* [B, k, d] -> std (S* - mean over d) / (its standard deviation over d) + mean, the names' by position and
        channel."""
        centred = s - s.mean(dim=-1, keepdim=True)
        found = self.std.to(s) * centred / s.std(dim=-1, keepdim=True).clamp_min(1e-8) + self.mean.to(s)
        return found

    @torch.no_grad()
    def measure(self, text_encoder: Any, tokenizer: Any, names: Sequence[str]) -> None:
        """Take those of `names`.

        Raises:
            ModelError: there are fewer than two, or one has another number of tokens than S* has words.
        """
        every = [token_ids(tokenizer, name) for name in names]
        for name, ids in zip(names, every, strict=True):
            if len(ids) != len(self.mean):
                raise ModelError(
                    f"model.words.names: '{name}' has {len(ids)} tokens, but a person has {len(self.mean)} words; name"
                    " people whose names have as many"
                )
        if len(names) < 2:
            raise ModelError(f"model.words.names: {len(names)} names have no spread; give at least two")
        embedding = text_encoder.get_input_embeddings()
        vectors = embedding(torch.tensor(every, device=next(embedding.parameters()).device)).float()
        self.mean.copy_(vectors.mean(dim=0))
        self.std.copy_(vectors.std(dim=0))


class WordEncoder(nn.Module):
    """Faces, or what a frozen recogniser reads of them -> S*; it depends on neither level nor timestep."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        face, words, widths = config.face, config.text_tokens, config.text_widths
        self.face = None
        if face.train == "all":
            if config.feature_layers != PIXELS:
                raise ModelError(
                    f"adapter: with face.train all the features are the channels {list(PIXELS)} of faces, not"
                    f" {list(config.feature_layers)}; encode the references for dreamidentity"
                )
            self.face = FaceRecogniser.of(face.config, face.identity_width, face.layers, face.pool)
        whole = config.feature_width if self.face is None else self.face.width
        self.columns = whole if face.scales == "all" else face.identity_width
        self.projector = WordProjector(self.columns, words, widths, config.words.hidden)
        self.names = nn.ModuleList(
            NameStatistics(words, width) for width in (widths if config.words.norm == "names" else ())
        )

    def forward(self, features: Tensor, timesteps: Tensor) -> EncoderOutput:
        """features [B, K, N, d] -> EncoderOutput with S* [B, 1, k, d_text] alone; timesteps are not read."""
        return self.output(self.s_plus(features, timesteps))

    def at_timesteps(self, features: Tensor, timesteps: Tensor) -> EncoderOutput:
        """As `forward`, with a T axis of 1: S* is the same at all timesteps."""
        return self.output(tuple(s[:, None] for s in self.s_plus(features, timesteps)))

    def s_plus(self, features: Tensor, timesteps: Tensor) -> tuple[Tensor, ...]:
        """S* [B, 1, k, d_text] per text encoder."""
        found = self.projector(self.read(features))
        if len(self.names):
            found = tuple(names(s) for names, s in zip(self.names, found, strict=True))
        return tuple(s[:, None] for s in found)

    def read(self, features: Tensor) -> Tensor:
        """features [B, K, N, d] -> the columns of v that the words read; the ID vector's are the last ones."""
        v = features.flatten(1) if self.face is None else self.face(features)
        return v[:, -self.columns :].to(next(self.projector.parameters()).dtype)

    @staticmethod
    def output(s_plus: tuple[Tensor, ...]) -> EncoderOutput:
        return EncoderOutput(v_cls=None, v_tokens=None, t_cls=None, s_plus=s_plus, visual_tokens=None)
