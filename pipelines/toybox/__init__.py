"""The embedded worlds: procedurally rendered subjects with known masks, identity, pose, background and captions.

`world` defines what can be seen in the world of toys, `rendering` draws it, `layouts` writes it to disk in the raw
layouts of the real sets; `faces` is the world of people.
"""

from runtime.stages import Stage

STAGE = Stage(
    name="toybox",
    module="pipelines.toybox.stage",
    summary="render the embedded world, toys or faces, in the raw layouts of the real sets",
    sections=("toybox",),
    metrics=False,
)
