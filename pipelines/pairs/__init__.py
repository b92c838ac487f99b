"""The pairs stage: which photos form a training sample."""

from runtime.stages import Stage

STAGE = Stage(
    name="pairs",
    module="pipelines.pairs.stage",
    summary="usable photos to triplets: reference, positive, target",
    sections=("pairs",),
    reads=("curate/frames", "mask/masks", "similarity/rejects"),
    writes=("triplets",),
)
