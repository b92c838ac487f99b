"""What an export says about a pair beside its images: one set of columns for every format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipelines.export.options import ExportOptions
from pipelines.export.render import PairImage

MEANINGS = {
    "id": "of the pair: the subject's id and a number",
    "subject": "id of the subject, the same in all of its pairs",
    "class": "class noun, as it stands in the caption",
    "text": "caption of the target",
    "_frame": "id of the photo, by which the rejects and the other tables of the pipeline name it",
    "_box": "x0, y0, x1, y1 of the subject, px of the image, the last two exclusive",
    "angle": "degrees between the viewing directions of reference and target; null without camera poses",
    "positive_angle": "the same of reference and positive",
    "method": "how the views were chosen: pose (by angle) or order (by distance in the capture)",
    "_mask_score": "of the mask, 0..1; 1 for an annotated one",
    "_sharpness": "of the photo: variance of the Laplacian",
    "_licence": "of the photo: SPDX id, or the source's name for it; null where it is not known",
    "_attribution": "whom to name for the photo, and where it is from; null where it is not known",
}
"""Meaning of each column; one that begins with _ is of each image, such as target_box."""
AND = " and "
"""Between the licences of a pair's photos."""
_DECIMALS = 4


def schema(options: ExportOptions) -> pa.Schema:
    """Return the columns of a record, without images."""
    text, number = pa.string(), pa.float32()
    columns: dict[str, pa.DataType] = {"id": text, "subject": text, "class": text, "text": text}
    columns |= {f"{role}_frame": text for role in options.roles()}
    if "box" in options.fields:
        columns |= {f"{role}_box": pa.list_(pa.int32()) for role in options.roles()}
    if "angle" in options.fields:
        columns |= {"angle": number} | ({"positive_angle": number} if options.views == 2 else {}) | {"method": text}
    if "quality" in options.fields:
        columns |= {f"{role}_{name}": number for name in ("mask_score", "sharpness") for role in options.roles()}
    if "licence" in options.fields:
        columns |= {f"{role}_{name}": text for name in ("licence", "attribution") for role in options.roles()}
    return pa.schema(list(columns.items()))


def record(pair: Mapping[str, Any], images: Mapping[str, PairImage], options: ExportOptions) -> dict[str, Any]:
    """Return the values of a pair, in the order of `schema`."""
    triplet = pair["triplet"]
    values: dict[str, Any] = {
        "id": triplet["triplet_id"],
        "subject": triplet["subject_id"],
        "class": triplet["class_name"],
        "text": pair["target"]["caption"],
        "angle": _rounded(triplet["reference_target_angle"]),
        "positive_angle": _rounded(triplet["reference_positive_angle"]),
        "method": triplet["method"],
    }
    for role in options.roles():
        frame = pair[role]
        mask = frame["extra"]
        values |= {
            f"{role}_frame": frame["frame_id"],
            f"{role}_box": images[role].box(),
            f"{role}_mask_score": _rounded(mask["score"] * mask["mask_score"]),
            f"{role}_sharpness": _rounded(frame["sharpness"]),
            f"{role}_licence": frame["licence"],
            f"{role}_attribution": frame["attribution"],
        }
    return {name: values[name] for name in schema(options).names}


def licence(pair: Mapping[str, Any], options: ExportOptions) -> str | None:
    """Return the licences of a pair's photos, joined by `and` where they differ; None where one is not known."""
    found = dict.fromkeys(pair[role]["licence"] for role in options.roles())
    return None if None in found else AND.join(found)


def attribution(pair: Mapping[str, Any], options: ExportOptions) -> str | None:
    """Return the attributions of a pair's photos, joined by semicolons where they differ; None where none is known."""
    return "; ".join(filter(None, dict.fromkeys(pair[role]["attribution"] for role in options.roles()))) or None


def _rounded(value: float | None) -> float | None:
    """Return a value of a table, fp32, without the digits that it does not have."""
    return None if value is None else round(value, _DECIMALS)
