"""Which three frames of a subject make a sample: reference (input), positive (other view), target (reconstructed)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from params import Section


class TripletParams(Section):
    """How triplets are chosen."""

    per_subject: int
    angle_band: tuple[float, float]  # degrees between viewing directions, reference to the other two
    order_band: tuple[float, float]  # the same as a fraction of the capture's length, where there are no poses
    seed: int


@dataclass(frozen=True)
class View:
    """A frame as the selection sees it; `direction` is the unit vector from object to camera, or None."""

    frame_id: str
    direction: np.ndarray | None


def viewing_directions(frames: Sequence[dict[str, Any]]) -> list[View]:
    """Return the frames' views. The point nearest to all optical axes stands in for an unknown object centre."""
    posed = [f for f in frames if f["rotation"] is not None]
    if len(posed) < 3:
        return [View(f["frame_id"], None) for f in frames]
    cameras, axes = {}, {}
    for frame in posed:
        rotation = np.asarray(frame["rotation"], dtype=np.float64).reshape(3, 3)
        cameras[frame["frame_id"]] = -rotation.T @ np.asarray(frame["translation"], dtype=np.float64)
        axes[frame["frame_id"]] = rotation[2]
    known = posed[0]["object_centre"]
    centre = np.asarray(known) if known is not None else _nearest_point(list(cameras.values()), list(axes.values()))
    views = []
    for frame in frames:
        camera = cameras.get(frame["frame_id"])
        offset = None if camera is None else camera - centre
        length = 0.0 if offset is None else float(np.linalg.norm(offset))
        views.append(View(frame["frame_id"], offset / length if offset is not None and length > 0 else None))
    return views


def _nearest_point(origins: Sequence[np.ndarray], directions: Sequence[np.ndarray]) -> np.ndarray:
    """Return the point with the least squared distance to the lines origin + s * direction (unit)."""
    projectors = [np.eye(3) - np.outer(d, d) for d in directions]
    weighted = sum(p @ o for p, o in zip(projectors, origins, strict=True))
    return np.linalg.lstsq(np.sum(projectors, axis=0), weighted, rcond=None)[0]


def angle(a: View, b: View) -> float | None:
    """Return the angle between two viewing directions in degrees, or None where one is unknown."""
    if a.direction is None or b.direction is None:
        return None
    return float(np.degrees(np.arccos(np.clip(a.direction @ b.direction, -1.0, 1.0))))


def select(subject_id: str, class_name: str, views: Sequence[View], params: TripletParams) -> list[dict[str, Any]]:
    """Return `per_subject` rows of the triplets table, the same ones for the same subject, frames and params.

    Targets go round the frames. For reference and positive a distance is drawn uniformly from the band, and the frame
    nearest to it is taken, those inside the band first, so that angles spread over the band and a subject with few
    views still gets its best ones.
    The three frames differ where the subject has three; with two, positive and target coincide; with one, all do.

    Args:
        views: in capture order.
    """
    # crc32 of the id, not hash(): the same in every process
    rng = np.random.default_rng([params.seed, zlib.crc32(subject_id.encode())])
    posed = [v for v in views if v.direction is not None]
    frames = posed if len(posed) >= 3 else list(views)
    by_pose = len(posed) >= 3
    if by_pose:
        distance = np.array([[angle(a, b) for b in frames] for a in frames], dtype=np.float64)
        band = params.angle_band
    else:
        positions = np.arange(len(frames))
        distance = np.abs(positions[:, None] - positions[None, :]) / max(len(frames) - 1, 1)
        band = params.order_band
    method = "augment" if len(frames) == 1 else "pose" if by_pose else "order"
    order = rng.permutation(len(frames))
    rows = []
    for index in range(params.per_subject):
        target = int(order[index % len(frames)])
        reference = _at_distance(distance[target], band, rng, (target,))
        positive = _at_distance(distance[reference], band, rng, (reference, target))
        chosen = [frames[i] for i in (reference, positive, target)]
        rows.append(
            {
                "triplet_id": f"{subject_id}/{index:03d}",
                "subject_id": subject_id,
                "class_name": class_name,
                "reference": chosen[0].frame_id,
                "positive": chosen[1].frame_id,
                "target": chosen[2].frame_id,
                "reference_target_angle": angle(chosen[0], chosen[2]),
                "reference_positive_angle": angle(chosen[0], chosen[1]),
                "method": method,
            }
        )
    return rows


def _at_distance(
    distance: np.ndarray, band: tuple[float, float], rng: np.random.Generator, avoid: tuple[int, ...]
) -> int:
    """Return the frame at the distance nearest to one drawn from `band`: inside the band and none of `avoid` if it can.

    Where no frame is inside, the nearest one is taken, whatever its distance.
    """
    outside = (distance < band[0]) | (distance > band[1])
    ranked = np.lexsort((np.abs(distance - rng.uniform(*band)), outside))
    for banned in (avoid, avoid[:1], ()):
        allowed = [int(i) for i in ranked if i not in banned]
        if allowed:
            return allowed[0]
    raise ValueError("a subject without frames has no triplets")
