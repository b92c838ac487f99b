"""Section `generate` of params.yaml."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from eval.protocol import protocol
from runtime.params import Section


class GenerateParams(Section):
    """Which pictures are made, and how."""

    methods: tuple[str, ...] = Field(min_length=1)  # names of eval/methods.py, or package.module:function of others
    protocol: protocol.ProtocolParams
    steps: int = Field(ge=1)  # of the sampler
    guidance_scale: float
    strength: float  # lambda, of the visual branch
    location_masks: bool  # confine the subject to where its attention lay a step before
    margin: float  # white border of the reference's segment, fraction of its longer side
    batch_size: int = Field(ge=1)  # pictures at once
    dtype: Literal["float32", "float16", "bfloat16"]
    threads: int  # CPU threads of a process; the same number gives the same bytes
    processes: int = Field(ge=1)  # which subjects are dealt out to; on GPUs at most one each. The same bytes for any

    @field_validator("methods")
    @classmethod
    def once(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(methods)) < len(methods):
            raise ValueError("a method is listed twice")
        return methods
