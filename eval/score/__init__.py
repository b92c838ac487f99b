"""Scores of subject and prompt fidelity."""

from runtime.stages import Stage

STAGE = Stage(
    name="score",
    module="eval.score.stage",
    rows="eval.score.scorer",
    summary="scores of the images, for all methods and two oracles",
    sections=("sources", "backbones", "generate", "score"),
    reads=("curate/frames", "curate/prompts", "generate/generations", "generate/protocol.json", "mask/masks"),
    writes=("scores", "segmentations", "protocol.json", "subject_groups.csv"),
    plots=("groups.csv",),
    options={
        "--photos-only": {"action": "store_true", "help": "score only the oracles on real photos, without generations"},
        "--images": {
            "action": "append",
            "metavar": "PLACE",
            "help": "score images made elsewhere too: a folder, tar or zip of <subject>/<prompt>_<seed>.png, or a CSV "
            "file with the columns path, subject, prompt, seed, reference; once for each method",
        },
        "--method-name": {
            "action": "append",
            "metavar": "NAME",
            "help": "method that made the images, once for each --images (default: the name of the folder or file)",
        },
        "--token": {"metavar": "WORD", "help": "word of their prompts that stands for the subject, such as sks"},
    },
    weights=("clip", "detector", "dino", "reward", "sam"),
)
