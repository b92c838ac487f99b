"""The encode stage: outputs of the frozen encoders, computed once."""

from runtime.stages import Stage

STAGE = Stage(
    name="encode",
    module="pipelines.encode.stage",
    rows="pipelines.encode.worker",
    summary="VAE latents of targets and image-encoder hidden states, computed once",
    sections=("sources", "backbones", "encode", "model.encoder", "model.projector"),
    reads=("curate/frames", "mask/masks", "pairs/triplets"),
    writes=("latents", "features", "rejects"),
    weights=("image_encoder", "diffusion"),
)
