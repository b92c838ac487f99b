"""The similarity stage: how similar subjects are."""

from runtime.stages import Stage

STAGE = Stage(
    name="similarity",
    module="pipelines.similarity.stage",
    rows="pipelines.similarity.worker",
    summary="embeddings of the segmented subjects and cosine tiles between them",
    sections=("sources", "backbones", "similarity"),
    reads=("curate/frames", "mask/masks"),
    writes=("embeddings", "similarity", "neighbours", "rejects"),
    weights=("clip", "dino"),
)
