"""RealCustom (Huang et al., CVPR 2024): scored image features in the place where the prompt's own word attends."""

from __future__ import annotations

from model.methods.base import AdapterMethod
from model.methods.config import AdapterConfig
from model.methods.guidance import RealCustomGuidance
from model.methods.realcustom.sampling import ScoredSampling
from model.methods.realcustom.scoring import KeyFeatureEncoder
from model.methods.realcustom.training import training_losses
from model.methods.realcustom.words import require_phrases
from runtime.errors import ModelError

GUIDANCE = RealCustomGuidance(
    key_ratio=0.8,  # [paper]
    scope=0.25,  # [paper]
    normalise="max",  # [paper]
    binary=False,  # [paper]
    self_attention=False,
    mask_steps=1.0,  # guidance needs the text pass in every step
    guidance="cascade",  # [paper]
    image_scale=12.5,  # [paper]
    negative="none",  # [a reading]
    text_mask=True,  # [the project page's figure only]
)


def check(config: AdapterConfig) -> None:
    """Raise ModelError if a config sets what only the MFI encoder has, or widens the features."""
    require_no_text_tokens(config)
    if config.visual_width != config.feature_width:
        raise ModelError(
            f"adapter: realcustom's tokens are image features, of width {config.feature_width}, but visual_width is"
            f" {config.visual_width}; set it to that width"
        )


def require_no_text_tokens(config: AdapterConfig) -> None:
    """Raise ModelError if a config has pseudo-words or tokens per layer."""
    if config.textual or config.tv_fusion:
        raise ModelError(f"adapter: {config.encoder} has no textual Q-Former; set textual and tv_fusion to false")
    if config.visual_scope != "all":
        raise ModelError(f"adapter: {config.encoder} has no tokens per layer; set visual_scope to all")


METHOD = AdapterMethod(
    "realcustom",
    check,
    KeyFeatureEncoder,
    training_losses,
    ScoredSampling,
    reads_prompt=lambda config: True,
    require_words=require_phrases,
    guidance=GUIDANCE,
    scales_features=True,
)
