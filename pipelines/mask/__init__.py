"""The mask stage: a mask for each frame."""

from runtime.stages import Stage

STAGE = Stage(
    name="mask",
    module="pipelines.mask.stage",
    rows="pipelines.mask.worker",
    summary="a mask for each frame, shipped with the photo or by Grounded SAM",
    sections=("sources", "backbones", "mask"),
    reads=("curate/frames",),
    writes=("masks", "agreement", "rejects"),
    weights=("detector", "sam"),
)
