"""DreamIdentity (Chen et al., AAAI 2024): a face recogniser's layers become two words that stand where a name would."""

from __future__ import annotations

from model.methods.base import AdapterMethod
from model.methods.config import AdapterConfig
from model.methods.dreamidentity.sampling import WordSampling
from model.methods.dreamidentity.training import training_losses
from model.methods.dreamidentity.words import WordEncoder
from runtime.errors import ModelError


def check(config: AdapterConfig) -> None:
    """Raise ModelError if a config sets what only the MFI encoder has, or does not describe the face recogniser."""
    if not config.textual:
        raise ModelError("adapter: dreamidentity has nothing but its words; set textual to true")
    if config.tv_fusion or config.visual_scope != "all":
        raise ModelError("adapter: dreamidentity has no visual tokens; set tv_fusion to false and visual_scope to all")
    if not config.face.config or config.face.identity_width < 1:
        raise ModelError(
            "adapter: face does not describe the face recogniser that dreamidentity reads; give its config,"
            " identity_width, layers and pool, as `FeatureSource.network` has them"
        )


METHOD = AdapterMethod(
    "dreamidentity", check, WordEncoder, training_losses, WordSampling, visual=False, positives=False
)
