"""Section `generate` of params.yaml."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from eval.protocol import protocol
from runtime.params import Section


class RealCustomParams(Section):
    """Sampling of realcustom and realcustom_pp; see `model.methods.guidance.RealCustomGuidance`. None: the method's."""

    key_ratio: float | None
    scope: float | None
    normalise: Literal["max", "min_max", "min_max_per_layer", "none"] | None
    threshold: float | None
    binary: bool | None
    self_attention: bool | None
    mask_steps: float | None
    guidance: Literal["cascade", "direct"] | None
    image_scale: float | None
    negative: Literal["none", "black"] | None
    text_mask: bool | None

    @field_validator("key_ratio", "scope", "mask_steps")
    @classmethod
    def is_a_share(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{value} is no share above 0, at most 1")
        return value


class GenerateParams(Section):
    """Which images are generated, and how."""

    methods: tuple[str, ...] = Field(
        min_length=1
    )  # keys of METHODS in eval/generate/methods.py, or package.module:function
    adapters: dict[str, str]  # folder of a trained adapter, by method, instead of those of the stages train and rivals
    names: dict[str, str]  # by subject_id, the name by which the base model knows a subject; for method name_prompt
    protocol: protocol.ProtocolParams
    steps: int = Field(ge=1)  # of the sampler
    guidance_scale: float
    strength: float  # lambda, the scale of the visual branch
    location_masks: bool  # confine the subject to where it attended in the previous step
    margin: float  # white border around the reference's segment, fraction of its longer side
    realcustom: RealCustomParams
    batch_size: int = Field(ge=1)  # images
    dtype: Literal["float32", "float16", "bfloat16"]
    threads: int  # CPU threads per process; the same number gives the same bytes
    processes: int = Field(
        ge=1
    )  # that subjects are distributed over; on GPUs at most one each. Any number gives the same bytes

    @field_validator("methods")
    @classmethod
    def once(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(methods)) < len(methods):
            raise ValueError("a method is listed twice")
        return methods
