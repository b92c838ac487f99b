"""The curate stage: photos of every source to frames."""

from runtime.stages import Stage

STAGE = Stage(
    name="curate",
    module="pipelines.curate.stage",
    rows="pipelines.curate.worker",
    summary="photos of every source to frames, and rejects with reasons",
    sections=("sources", "curate"),
    reads=("toybox",),
    writes=("frames", "rejects", "prompts"),
)
