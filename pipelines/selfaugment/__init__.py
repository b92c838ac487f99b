"""The selfaugment stage: pictures that the base model makes of people whose names it knows."""

from runtime.stages import Stage

STAGE = Stage(
    name="selfaugment",
    module="pipelines.selfaugment.stage",
    rows="pipelines.selfaugment.worker",
    summary="names that the base model knows to pictures of these people, as photos",
    sections=("backbones", "selfaugment"),
    writes=("generated", "people", "pictures", "rejects"),
    weights=("clip", "detector", "diffusion"),
)
