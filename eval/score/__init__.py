"""Scores of subject and prompt fidelity."""

from runtime.stages import Stage

STAGE = Stage(
    name="score",
    module="eval.score.stage",
    rows="eval.score.scorer",
    summary="scores of the images, for all methods and two oracles",
    sections=("sources", "backbones", "generate", "score"),
    reads=("curate/frames", "curate/prompts", "generate/generations", "generate/protocol.json", "mask/masks"),
    writes=("scores", "segmentations", "protocol.json"),
    plots=("groups.csv",),
    options={
        "--photos-only": {"action": "store_true", "help": "score only the oracles on real photos, without generations"}
    },
    weights=("clip", "detector", "dino", "reward", "sam"),
)
