"""Location of the subject in the attention maps during sampling."""

from runtime.stages import Stage

STAGE = Stage(
    name="location",
    module="eval.probes.location.stage",
    summary="location masks of a few images, step by step",
    sections=("sources", "backbones", "generate", "location"),
    reads=("curate/frames", "generate/generations", "mask/masks", "train/adapter"),
    writes=("location_masks",),
    options={
        "--adapter": {"metavar": "DIR", "help": "adapter that generated the images (default: <data>/train/adapter)"}
    },
    weights=("image_encoder", "diffusion"),
)
