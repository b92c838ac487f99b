"""One self-contained page."""

from runtime.stages import Stage

STAGE = Stage(
    name="report",
    module="eval.report.stage",
    summary="one HTML page of what all stages made",
    sections=("sources", "report"),
    reads=(
        "curate",
        "mask",
        "similarity",
        "pairs",
        "encode/metrics.json",
        "train",
        "generate",
        "score",
        "views",
        "location",
    ),
    metrics=False,
)
