"""S+ across views of a subject."""

from runtime.stages import Stage

STAGE = Stage(
    name="views",
    module="eval.probes.views.stage",
    summary="S+ of photos: does it separate subjects across views",
    sections=("sources", "backbones", "views"),
    reads=("curate/frames", "mask/masks", "train/adapter"),
    writes=("view_tokens",),
    plots=("map.csv",),
    weights=("image_encoder",),
)
