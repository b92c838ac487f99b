"""Trains the adapter with DeepSpeed ZeRO around a frozen backbone."""

from runtime.stages import Stage

STAGE = Stage(
    name="train",
    module="train.launch",
    also=("train.run",),
    summary="train the adapter with DeepSpeed ZeRO",
    sections=("sources", "backbones", "encode", "model", "train"),
    reads=(
        "curate/frames",
        "pairs/triplets",
        "encode/features",
        "encode/latents",
        "mask/masks",
        "similarity/similarity",
    ),
    writes=("adapter",),
    plots=("losses.csv", "validation.csv"),
    options={
        "--resume": {"metavar": "FOLDER", "help": "resume the run in this folder"},
        "--other-ranks": {"action": "store_true", "help": "with --resume: the run had a different number of ranks"},
    },
    weights=("image_encoder", "diffusion"),
)
