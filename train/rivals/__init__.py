"""Trains the adapters of the other methods that are compared."""

from runtime.stages import Stage

STAGE = Stage(
    name="rivals",
    module="train.rivals.stage",
    also=("train.launch", "train.run"),
    summary="train the adapters of the other methods in generate.methods",
    sections=("sources", "backbones", "encode", "model", "train", "rivals", "generate"),
    reads=(
        "curate/frames",
        "pairs/triplets",
        "encode/features",
        "encode/latents",
        "mask/masks",
        "similarity/similarity",
    ),
    writes=("adapters",),
    weights=("image_encoder", "diffusion"),
)
