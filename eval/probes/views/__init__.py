"""S+ over the views of a subject."""

from runtime.stages import Stage

STAGE = Stage(
    name="views",
    module="eval.probes.views.stage",
    summary="S+ of photos: does it tell subjects apart, whatever the view",
    sections=("sources", "backbones", "views"),
    reads=("curate/frames", "mask/masks", "train/adapter"),
    writes=("view_tokens",),
    plots=("map.csv",),
    weights=("image_encoder",),
)
