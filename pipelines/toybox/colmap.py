"""COLMAP's binary sparse models (https://colmap.github.io/format.html), written from exact poses and depth maps."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

PINHOLE = 1
SEEN = 0.04
"""A point is visible in a view if their depths differ by less than this, in radii of the enclosing sphere."""


@dataclass(frozen=True)
class Shot:
    """One registered image.

    rotation [3, 3], translation [3]: world to camera. rgb uint8 [H, W, 3]; depth float [H, W], 0 without a surface.
    """

    name: str
    rotation: NDArray[np.float64]
    translation: NDArray[np.float64]
    rgb: NDArray[np.uint8]
    depth: NDArray[np.float32]


def _lift(
    shot: Shot,
    k: NDArray[np.float64],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
) -> NDArray[np.float64]:
    """World points [N, 3] of pixels with a depth."""
    z = shot.depth[rows, columns].astype(np.float64)
    pixel = np.stack(
        [
            (columns + 0.5 - k[0, 2]) / k[0, 0],
            (rows + 0.5 - k[1, 2]) / k[1, 1],
            np.ones_like(z),
        ],
        1,
    )
    return (pixel * z[:, None] - shot.translation) @ shot.rotation


def surface_points(
    shots: Sequence[Shot],
    k: NDArray[np.float64],
    per_shot: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Up to per_shot random surface points of every image: positions [N, 3] and colours uint8 [N, 3]."""
    points, colours = [], []
    for shot in shots:
        rows, columns = np.nonzero(shot.depth > 0)
        chosen = rng.choice(len(rows), min(per_shot, len(rows)), replace=False)
        rows, columns = rows[chosen], columns[chosen]
        points.append(_lift(shot, k, rows, columns))
        colours.append(shot.rgb[rows, columns])
    return np.concatenate(points), np.concatenate(colours)


def observations(
    points: NDArray[np.float64], shot: Shot, k: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Indices of the points visible in the image, and their positions [M, 2] (pixels)."""
    size_y, size_x = shot.depth.shape
    camera = points @ shot.rotation.T + shot.translation
    x = k[0, 0] * camera[:, 0] / camera[:, 2] + k[0, 2]
    y = k[1, 1] * camera[:, 1] / camera[:, 2] + k[1, 2]
    column, row = (
        np.floor(x).astype(int).clip(0, size_x - 1),
        np.floor(y).astype(int).clip(0, size_y - 1),
    )
    depth = shot.depth[row, column]
    seen = (depth > 0) & (np.abs(depth - camera[:, 2]) < SEEN) & (x >= 0) & (y >= 0) & (x < size_x) & (y < size_y)
    return np.nonzero(seen)[0], np.stack([x, y], 1)[seen]


def write_model(
    folder: Path,
    shots: Sequence[Shot],
    k: NDArray[np.float64],
    rng: np.random.Generator,
    per_shot: int = 60,
) -> None:
    """Write cameras.bin (one PINHOLE camera), images.bin and points3D.bin with tracks of at least two images."""
    points, colours = surface_points(shots, k, per_shot, rng)
    found = [observations(points, shot, k) for shot in shots]
    tracks = np.bincount(np.concatenate([index for index, _ in found]), minlength=len(points))
    ids = np.where(tracks >= 2, np.cumsum(tracks >= 2), 0)
    height, width = shots[0].depth.shape

    folder.mkdir(parents=True, exist_ok=True)
    camera = struct.pack("<QiiQQ4d", 1, 1, PINHOLE, width, height, k[0, 0], k[1, 1], k[0, 2], k[1, 2])
    (folder / "cameras.bin").write_bytes(camera)

    images = [struct.pack("<Q", len(shots))]
    track: dict[int, list[tuple[int, int]]] = {}
    for number, (shot, (index, at)) in enumerate(zip(shots, found, strict=True), start=1):
        x, y, z, w = Rotation.from_matrix(shot.rotation).as_quat(canonical=True)
        images.append(struct.pack("<i7di", number, w, x, y, z, *shot.translation, 1) + shot.name.encode() + b"\0")
        kept = [(p, xy) for p, xy in zip(index, at, strict=True) if ids[p]]
        images.append(struct.pack("<Q", len(kept)))
        for place, (p, xy) in enumerate(kept):
            images.append(struct.pack("<ddq", *xy, ids[p]))
            track.setdefault(int(p), []).append((number, place))
    (folder / "images.bin").write_bytes(b"".join(images))

    cloud = [struct.pack("<Q", len(track))]
    for p in sorted(track):
        cloud.append(struct.pack("<Q3d3BdQ", ids[p], *points[p], *colours[p].tolist(), 0.0, len(track[p])))
        cloud.extend(struct.pack("<ii", *seen) for seen in track[p])
    (folder / "points3D.bin").write_bytes(b"".join(cloud))
