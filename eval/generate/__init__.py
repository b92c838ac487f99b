"""Images of the held-out subjects."""

from runtime.stages import Stage

STAGE = Stage(
    name="generate",
    module="eval.generate.stage",
    rows="eval.generate.generator",
    summary="images of the held-out subjects for every prompt, by each method",
    sections=("sources", "backbones", "generate"),
    reads=("curate/frames", "curate/prompts", "mask/masks", "train/adapter", "rivals/adapters"),
    writes=("generations", "protocol.json"),
    options={"--adapter": {"metavar": "DIR", "help": "the adapter to use (default: <data>/train/adapter)"}},
    weights=("image_encoder", "diffusion"),
)
