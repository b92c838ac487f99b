"""How well images keep the subject and follow the prompt."""

from runtime.stages import Stage

STAGE = Stage(
    name="score",
    module="eval.score.stage",
    rows="eval.score.scorer",
    summary="scores of the images, with two oracles beside the methods",
    sections=("sources", "backbones", "generate", "score"),
    reads=("curate/frames", "curate/prompts", "generate/generations", "generate/protocol.json", "mask/masks"),
    writes=("scores", "segmentations", "protocol.json"),
    plots=("groups.csv",),
    options={"--photos-only": {"action": "store_true", "help": "score the oracles on real photos, no generations"}},
    weights=("clip", "detector", "dino", "reward", "sam"),
)
