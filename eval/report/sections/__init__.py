"""The sections of the report: each reads its stages' outputs and returns the template's data, or raises `Missing`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eval.report.sections.base import Missing, ReportParams, Sources
from eval.report.sections.data import licences, masks, rejects, similarity, triplets
from eval.report.sections.inside import location, training, views
from eval.report.sections.pictures import gallery, misses, picks, side_by_side
from eval.report.sections.provenance import stages
from eval.report.sections.scores import groups, scores

__all__ = ["SECTIONS", "Missing", "ReportParams", "Sources"]

SECTIONS: dict[str, Callable[[Sources], dict[str, Any]]] = {
    "scores": scores,
    "groups": groups,
    "gallery": gallery,
    "picks": picks,
    "side_by_side": side_by_side,
    "misses": misses,
    "location": location,
    "views": views,
    "training": training,
    "masks": masks,
    "triplets": triplets,
    "similarity": similarity,
    "rejects": rejects,
    "licences": licences,
    "stages": stages,
}
