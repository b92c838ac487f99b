"""The report: one self-contained HTML page."""

from runtime.stages import Stage

STAGE = Stage(
    name="report",
    module="eval.report.stage",
    summary="one HTML page with the results of all stages",
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
