"""The embedded world: procedurally rendered subjects with known masks, identity, pose, background and captions.

`world` defines what can be seen, `rendering` draws it, `layouts` writes it to disk in the raw layouts of the real sets.
"""

from runtime.stages import Stage

STAGE = Stage(
    name="toybox",
    module="pipelines.toybox.stage",
    summary="render the embedded world in the layouts of MVImgNet, Open Images, DreamBench",
    sections=("toybox",),
    metrics=False,
)
