"""Cameras around an object, as PyTorch3D has them, and where COLMAP's convention puts a point."""

from __future__ import annotations

import numpy as np

from pipelines.sources import Pose

CENTRE = np.array([1.0, 2.0, 3.0])
"""What the cameras look at."""


def on_a_ring(number: int) -> tuple[np.ndarray, np.ndarray]:
    """R [3, 3] and T [3] of a camera 4 units from CENTRE that looks at it; x_camera = x_world R + T, rows."""
    angle = 0.7 * number
    place = CENTRE + 4 * np.array([np.sin(angle), 0.3, np.cos(angle)]) / np.hypot(1, 0.3)
    forward = (CENTRE - place) / np.linalg.norm(CENTRE - place)
    left = np.cross([0.0, 1.0, 0.0], forward)
    left /= np.linalg.norm(left)
    rotation = np.stack([left, np.cross(forward, left), forward], axis=1)  # columns: the camera's axes in the world
    return rotation, -place @ rotation


def pixel_of(pose: Pose, point: np.ndarray) -> tuple[float, float]:
    """Where a camera of COLMAP's convention sees a point of the world, px from the upper left corner."""
    seen = np.array(pose.rotation).reshape(3, 3) @ point + np.array(pose.translation)
    x, y = np.array(pose.focal) * seen[:2] / seen[2] + np.array(pose.centre)
    return float(x), float(y)
