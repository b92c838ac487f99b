"""RealCustom++ (Mao et al. 2024): tokens of a high-resolution projector in RealCustom's masks, guided directly."""

from __future__ import annotations

from torch import Tensor, nn

from model.methods.base import AdapterMethod, EncoderOutput
from model.methods.config import AdapterConfig
from model.methods.guidance import RealCustomGuidance
from model.methods.realcustom import require_no_text_tokens
from model.methods.realcustom.words import require_phrases
from model.methods.realcustom_pp.projector import Projector
from model.methods.realcustom_pp.sampling import ProjectedSampling
from model.methods.realcustom_pp.training import training_losses

GUIDANCE = RealCustomGuidance(
    key_ratio=1.0,
    scope=0.25,  # [paper, code]
    normalise="max",  # [scripts]
    binary=False,  # [code]
    self_attention=False,  # [what is released]
    mask_steps=0.48,  # [scripts: 12 of 25]
    guidance="direct",  # [code]
    image_scale=0.0,
    negative="black",  # [code]
    text_mask=False,
)


class ProjectedEncoder(nn.Module):
    """The projector behind the interface of an encoder; it reads neither timestep nor prompt."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        sizes = config.projector
        self.projector = Projector(
            feature_width=config.feature_width,
            visual_width=config.visual_width,
            head=sizes.head,
            high=sizes.high,
            shallow=sizes.shallow,
        )

    def forward(self, features: Tensor, timesteps: Tensor) -> EncoderOutput:
        """features [B, K, N, d] -> EncoderOutput without text."""
        tokens = self.projector(features)
        return EncoderOutput(v_cls=tokens.mean(dim=1), v_tokens=tokens, t_cls=None, s_plus=None, visual_tokens=tokens)


METHOD = AdapterMethod(
    "realcustom_pp",
    require_no_text_tokens,
    ProjectedEncoder,
    training_losses,
    ProjectedSampling,
    reads_prompt=lambda config: True,
    require_words=require_phrases,
    guidance=GUIDANCE,
    drops_to_black=True,
    positives=False,
)
