"""CustomContrast (Chen et al., AAAI 2025): MFI encoder, multilevel contrastive losses, S+ and location masks."""

from __future__ import annotations

from model.methods.base import AdapterMethod
from model.methods.config import AdapterConfig
from model.methods.customcontrast.mfi import MFIEncoder
from model.methods.customcontrast.sampling import SubjectSampling
from model.methods.customcontrast.training import training_losses
from runtime.errors import ModelError


def check(config: AdapterConfig) -> None:
    """Raise ModelError if the MFI encoder's switches are inconsistent."""
    if config.tv_fusion and not config.textual:
        raise ModelError("adapter: tv_fusion needs the textual Q-Former; set textual too, or tv_fusion to false")
    if config.visual_scope not in ("all", "own"):
        raise ModelError(f"adapter: visual_scope is '{config.visual_scope}'; use all or own")
    if config.visual_scope == "own" and not config.tv_fusion:
        raise ModelError("adapter: visual_scope own needs tv_fusion; only refined visual tokens belong to a layer")


def encoder(config: AdapterConfig) -> MFIEncoder:
    """The MFI encoder with new weights."""
    return MFIEncoder(
        **config.encoder_sizes,
        feature_layers=len(config.feature_layers),
        levels=config.level_count,
        text_tokens=config.text_tokens,
        text_widths=config.text_widths,
        textual=config.textual,
        tv_fusion=config.tv_fusion,
        code=(config.fourier_pairs, config.fourier_sigma_t, config.fourier_sigma_l, config.fourier_seed),
    )


METHOD = AdapterMethod("mfi", check, encoder, training_losses, SubjectSampling)
