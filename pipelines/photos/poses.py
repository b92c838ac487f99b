"""Viewing directions of photos, from the camera poses of the frames table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

POSE_COLUMNS = ("rotation", "translation", "object_centre")
"""Columns of the frames table that directions are computed from."""


def viewing_directions(frames: pa.Table, starts: np.ndarray) -> np.ndarray:
    """Return the unit vectors from object to camera [N, 3], NaN where unknown, as in subjects with fewer than 3 poses.

    The point nearest to all optical axes stands in for an unknown object centre.

    Args:
        frames: rotation, translation, object_centre. starts: first row of each subject [S].
    """
    rotation = _vectors(frames["rotation"], 9).reshape(-1, 3, 3)
    camera = -(rotation * _vectors(frames["translation"], 3)[:, :, None]).sum(axis=1)
    posed = np.isfinite(camera).all(axis=1)
    count = np.add.reduceat(posed, starts)
    length = np.diff(np.append(starts, len(posed)))
    centre = _vectors(frames["object_centre"], 3)
    unknown = (np.isnan(np.fmin.reduceat(centre, starts)).any(axis=1)) & (count >= 3)
    centre = np.fmin.reduceat(centre, starts)  # the same in all rows of a subject that have it
    if unknown.any():
        rows = np.flatnonzero(np.repeat(unknown, length) & posed)
        owner = np.repeat(np.arange(len(starts)), length)[rows]
        first = np.flatnonzero(np.append(True, owner[1:] != owner[:-1]))
        centre[unknown] = nearest_points(camera[rows], rotation[rows, 2], first)
    offset = camera - np.repeat(centre, length, axis=0)
    norm = np.sqrt((offset**2).sum(axis=1, keepdims=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        directions = np.where(norm > 0, offset / norm, np.nan)
    directions[np.repeat(count < 3, length)] = np.nan
    return directions


def nearest_points(origins: np.ndarray, directions: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the point with the least squared distance to the lines origin + s * direction (unit) of each group [S, 3].

    Args:
        origins: [N, 3].
        directions: [N, 3], unit length.
        starts: first row of each group [S].
    """
    across = np.eye(3) - directions[:, :, None] * directions[:, None, :]
    weighted = (across * origins[:, None, :]).sum(axis=2)
    inverse = np.linalg.pinv(np.add.reduceat(across, starts), hermitian=True)
    return (inverse * np.add.reduceat(weighted, starts)[:, None, :]).sum(axis=2)


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the degrees between unit vectors a and b [..., 3], broadcast, 0..180; NaN where one is."""
    cosine = sum(a[..., axis] * b[..., axis] for axis in range(3))  # no matmul: its summation order varies
    return np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))


def _vectors(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """Return a column of fixed-size lists as [N, width] float64, NaN where it is null."""
    found = np.full((len(column), width), np.nan)
    valid = column.is_valid()
    present = column.filter(valid)
    if len(present):
        flat = np.concatenate([chunk.flatten().to_numpy() for chunk in present.chunks])
        found[valid.to_numpy()] = flat.reshape(-1, width)
    return found
