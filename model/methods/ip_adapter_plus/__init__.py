"""IP-Adapter-plus (Ye et al. 2023), the baseline: a resampler and decoupled cross-attention, no pseudo-words.

It is trained and sampled like CustomContrast without the textual half: the contrastive losses are off.
"""

from __future__ import annotations

from model.methods.base import AdapterMethod
from model.methods.config import AdapterConfig
from model.methods.customcontrast.sampling import SubjectSampling
from model.methods.customcontrast.training import training_losses
from model.methods.ip_adapter_plus.resampler import IPAdapterPlusEncoder
from runtime.errors import ModelError


def check(config: AdapterConfig) -> None:
    """Raise ModelError if a config sets what only the MFI encoder has."""
    if config.textual or config.tv_fusion:
        raise ModelError("adapter: ip_adapter_plus has no textual Q-Former; set textual and tv_fusion to false")
    if config.visual_scope != "all":
        raise ModelError("adapter: ip_adapter_plus has no tokens per layer; set visual_scope to all")


def encoder(config: AdapterConfig) -> IPAdapterPlusEncoder:
    """The resampler with new weights."""
    return IPAdapterPlusEncoder(**config.encoder_sizes)


METHOD = AdapterMethod("ip_adapter_plus", check, encoder, training_losses, SubjectSampling)
