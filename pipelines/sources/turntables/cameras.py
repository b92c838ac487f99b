"""PyTorch3D's cameras (https://pytorch3d.org/docs/cameras), as CO3D and uCO3D annotate them, in COLMAP's convention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.sources.base import Pose

ISOTROPIC = "ndc_isotropic"
BY_SIDE = "ndc_norm_image_bounds"
_FLIP = np.diag([-1.0, -1.0, 1.0])
_ORTHONORMAL = 1e-3  # fp32 annotations miss it by 1e-6


def pose(rotation: Any, translation: Any, focal: Any, point: Any, size: Sequence[int], intrinsics: str) -> Pose | None:
    """Return an annotated camera as a pose; None if its numbers are no camera.

    PyTorch3D multiplies row vectors, x_camera = x_world R + T, and its camera looks along z with x to the left and y
    up; COLMAP's has x to the right and y down. With F = diag(-1, -1, 1): rotation F R^T, translation F T.

    In NDC x grows to the left and y upwards from the image's centre, and 1 is s px: half the shorter side (isotropic),
    or half of each side (by side). In px from the upper left corner: focal length s f, principal point side/2 - s p.

    Args:
        rotation: R, rows of 3. translation: T [3]. focal, point: x and y, NDC.
        size: height and width of the image, px.
        intrinsics: ISOTROPIC or BY_SIDE.
    """
    try:
        r, t, f, p = (np.asarray(values, dtype=np.float64) for values in (rotation, translation, focal, point))
        sides = np.array([size[1], size[0]], dtype=np.float64)
    except (TypeError, ValueError, IndexError):
        return None
    if (r.shape, t.shape, f.shape, p.shape) != ((3, 3), (3,), (2,), (2,)) or intrinsics not in (ISOTROPIC, BY_SIDE):
        return None
    numbers = np.concatenate([r.ravel(), t, f, p, sides])
    if not np.isfinite(numbers).all() or sides.min() < 1 or np.abs(r @ r.T - np.eye(3)).max() > _ORTHONORMAL:
        return None
    scale = sides / 2 if intrinsics == BY_SIDE else np.full(2, sides.min() / 2)
    return Pose(
        tuple((_FLIP @ r.T).ravel().tolist()),  # type: ignore[arg-type]
        tuple((_FLIP @ t).tolist()),
        tuple((scale * f).tolist()),
        tuple((sides / 2 - scale * p).tolist()),
    )
