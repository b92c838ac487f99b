"""The baseline of the MFI encoder: IP-Adapter-plus (Ye et al. 2023), built from diffusers' own modules."""

from __future__ import annotations

from diffusers.models.embeddings import IPAdapterPlusImageProjection
from torch import Tensor, nn

from model.methods.base import EncoderOutput


class IPAdapterPlusEncoder(nn.Module):
    """IP-Adapter-plus's resampler behind the interface of `mfi.MFIEncoder`: visual tokens only, no pseudo-words.

    It reads one layer of the image encoder; followed by the K', V' of `adapter.Adapter`, this is IP-Adapter-plus.
    """

    def __init__(
        self, *, feature_width: int, width: int, heads: int, depth: int, visual_tokens: int, visual_width: int
    ) -> None:
        """The sizes of `AdapterConfig` of the same names."""
        super().__init__()
        self.resampler = IPAdapterPlusImageProjection(
            embed_dims=feature_width,
            output_dims=visual_width,
            hidden_dims=width,
            depth=depth,
            dim_head=width // heads,
            heads=heads,
            num_queries=visual_tokens,
        )

    def forward(self, features: Tensor, timesteps: Tensor) -> EncoderOutput:
        """features [B, K, N, d] -> EncoderOutput without text. Only the last layer of the features is read; the
        timesteps are ignored."""
        tokens = self.resampler(features[:, -1].to(self.resampler.latents.dtype))
        return EncoderOutput(v_cls=tokens.mean(dim=1), v_tokens=tokens, t_cls=None, s_plus=None, visual_tokens=tokens)

    def at_timesteps(self, features: Tensor, timesteps: Tensor, chunk: int = 16) -> EncoderOutput:
        """As `forward`: nothing here depends on the timestep."""
        return self(features, timesteps)
