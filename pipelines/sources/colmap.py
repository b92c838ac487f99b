"""Reader of COLMAP sparse models, binary and text (https://colmap.github.io/format.html)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from scipy.spatial.transform import Rotation

from pipelines.photos.decode import DecodeError
from pipelines.photos.roots import Root
from pipelines.sources.base import Pose

# (name, number of parameters) by model id; the order is COLMAP's src/colmap/sensor/models.h.
CAMERA_MODELS: tuple[tuple[str, int], ...] = (
    ("SIMPLE_PINHOLE", 3),
    ("PINHOLE", 4),
    ("SIMPLE_RADIAL", 4),
    ("RADIAL", 5),
    ("OPENCV", 8),
    ("OPENCV_FISHEYE", 8),
    ("FULL_OPENCV", 12),
    ("FOV", 5),
    ("SIMPLE_RADIAL_FISHEYE", 4),
    ("RADIAL_FISHEYE", 5),
    ("THIN_PRISM_FISHEYE", 12),
    ("RAD_TAN_THIN_PRISM_FISHEYE", 16),
)
_PARAMETERS = dict(CAMERA_MODELS)
_ONE_FOCAL = {"SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE"}

T = TypeVar("T")

_COUNT = struct.Struct("<Q")
_CAMERA = struct.Struct("<iiQQ")
_IMAGE = struct.Struct("<i7di")
_POINT = struct.Struct("<Q3d3BdQ")
_POINT2D_BYTES = 24
_TRACK_BYTES = 8


# Optical axes count as parallel below this mean squared sine of the angle to their main direction: that of 5 degrees.
_AXES_SPREAD = 0.0076


class ColmapError(ValueError):
    """A model file is truncated, malformed, or refers to something missing."""


@dataclass(frozen=True)
class Camera:
    """Intrinsics: parameters in COLMAP's order for that model, px."""

    model: str
    width: int
    height: int
    parameters: tuple[float, ...]

    @property
    def focal(self) -> tuple[float, float]:
        """(fx, fy), px."""
        return self.parameters[0], self.parameters[0 if self.model in _ONE_FOCAL else 1]

    @property
    def centre(self) -> tuple[float, float]:
        """Principal point (cx, cy), px."""
        first = 1 if self.model in _ONE_FOCAL else 2
        return self.parameters[first], self.parameters[first + 1]


@dataclass(frozen=True)
class Image:
    """A registered image. quaternion: (w, x, y, z) and translation: world to camera."""

    name: str
    quaternion: tuple[float, float, float, float]
    translation: tuple[float, float, float]
    camera_id: int


@dataclass(frozen=True)
class Model:
    """A sparse model. read_points: reads its points, which are most of its bytes and rarely needed."""

    cameras: dict[int, Camera]
    images: tuple[Image, ...]
    read_points: Callable[[], np.ndarray]

    @property
    def points(self) -> np.ndarray:
        """[N, 3] in world units, none if there is no file of them; ColmapError if it is truncated or malformed."""
        return self.read_points()


def read_model(root: Root, folder: str) -> Model | None:
    """Return the model in a folder, binary files before text files; None if there is none. Points may be absent.

    Raises:
        ColmapError: a file is truncated or malformed; names it.
    """
    present = set(root.files(folder))
    for suffix, (read_cameras, read_images, read_points) in _READERS.items():
        if {f"cameras.{suffix}", f"images.{suffix}"} <= present:
            cameras = _read_file(root, f"{folder}/cameras.{suffix}", read_cameras)
            images = _read_file(root, f"{folder}/images.{suffix}", read_images)
            file = f"points3D.{suffix}"
            return Model(
                cameras,
                images,
                partial(_read_file, root, f"{folder}/{file}", read_points) if file in present else _no_points,
            )
    return None


def poses(model: Model) -> dict[str, Pose]:
    """Return {image name: pose}.

    Raises:
        ColmapError: an image names a missing camera, or its numbers are not a pose.
    """
    return {image.name: _pose(image, model.cameras) for image in model.images}


def object_centre(cameras: Collection[Pose], points: Callable[[], np.ndarray]) -> tuple[float, float, float] | None:
    """Return the centre of the object that the cameras look at, in world units, or None if it cannot be determined.

    It is the point nearest to all optical axes (least squares) if those differ enough and most cameras see it in front,
    otherwise the component-wise median of the sparse points [N, 3], which are read only then. The median is biased
    towards the background: of 5 real captures with masks it fell on the object in 20 % of the views of the worst, the
    axes' point in every view of each.
    """
    centre = _nearest_to_axes(cameras)
    if centre is None:
        found = points()
        finite = found[np.isfinite(found).all(axis=1)]
        if not len(finite):
            return None
        centre = np.median(finite, axis=0)
    x, y, z = (float(value) for value in centre)
    return x, y, z


def cameras_from_binary(data: bytes) -> dict[int, Camera]:
    """Return the cameras of `cameras.bin` by id."""
    (count,), at = _COUNT.unpack_from(data), _COUNT.size
    cameras = {}
    for _ in range(count):
        camera_id, model_id, width, height = _CAMERA.unpack_from(data, at)
        at += _CAMERA.size
        if not 0 <= model_id < len(CAMERA_MODELS):
            raise ColmapError(f"camera {camera_id} has the unknown model id {model_id}")
        name, number = CAMERA_MODELS[model_id]
        cameras[camera_id] = Camera(name, width, height, struct.unpack_from(f"<{number}d", data, at))
        at += 8 * number
    return cameras


def images_from_binary(data: bytes) -> tuple[Image, ...]:
    """Return the images of `images.bin` in the order of the file; 2-D points are skipped."""
    (count,), at = _COUNT.unpack_from(data), _COUNT.size
    images = []
    for _ in range(count):
        _, w, x, y, z, tx, ty, tz, camera_id = _IMAGE.unpack_from(data, at)
        at += _IMAGE.size
        end = data.index(b"\0", at)
        name = data[at:end].decode("utf-8")
        (points,) = _COUNT.unpack_from(data, end + 1)
        at = end + 1 + _COUNT.size + points * _POINT2D_BYTES
        images.append(Image(name, (w, x, y, z), (tx, ty, tz), camera_id))
    if at > len(data):
        raise ColmapError("the last image is truncated")
    return tuple(images)


def points_from_binary(data: bytes) -> np.ndarray:
    """Return the points of `points3D.bin` [N, 3] in the order of the file; colours and tracks are skipped."""
    (count,), at = _COUNT.unpack_from(data), _COUNT.size
    points = []
    for _ in range(count):
        _, x, y, z, _, _, _, _, track = _POINT.unpack_from(data, at)
        at += _POINT.size + track * _TRACK_BYTES
        points.append((x, y, z))
    if at > len(data):
        raise ColmapError("the last point is truncated")
    return np.array(points, dtype=np.float64).reshape(-1, 3)


def cameras_from_text(data: bytes) -> dict[int, Camera]:
    """Return the cameras of `cameras.txt` by id."""
    cameras = {}
    for line in _content(data):
        camera_id, model, width, height, *parameters = line.split()
        if _PARAMETERS.get(model) != len(parameters):
            raise ColmapError(f"camera {camera_id} has the model {model} with {len(parameters)} parameters")
        cameras[int(camera_id)] = Camera(model, int(width), int(height), tuple(map(float, parameters)))
    return cameras


def images_from_text(data: bytes) -> tuple[Image, ...]:
    """Return the images of `images.txt` in the order of the file; each has a second line, of 2-D points or empty."""
    images = []
    lines = iter(data.decode("utf-8").split("\n"))
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        _, *numbers, camera_id, name = line.strip().split(maxsplit=9)
        w, x, y, z, tx, ty, tz = map(float, numbers)
        images.append(Image(name, (w, x, y, z), (tx, ty, tz), int(camera_id)))
        next(lines, None)
    return tuple(images)


def points_from_text(data: bytes) -> np.ndarray:
    """Return the points of `points3D.txt` [N, 3] in the order of the file."""
    points = [[float(value) for value in line.split(maxsplit=4)[1:4]] for line in _content(data)]
    return np.array(points, dtype=np.float64).reshape(-1, 3)


_READERS = {
    "bin": (cameras_from_binary, images_from_binary, points_from_binary),
    "txt": (cameras_from_text, images_from_text, points_from_text),
}


def _no_points() -> np.ndarray:
    return np.empty((0, 3))


def _content(data: bytes) -> list[str]:
    lines = (line.strip() for line in data.decode("utf-8").split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def _read_file(root: Root, path: str, read: Callable[[bytes], T]) -> T:
    try:
        return read(root.read(path))
    except (ValueError, OverflowError, OSError, struct.error, DecodeError) as error:
        raise ColmapError(f"{root.name(path)} is not a readable COLMAP file: {error}") from None


def _nearest_to_axes(cameras: Collection[Pose]) -> np.ndarray | None:
    """Return the point x [3] that minimises the sum of squared distances to the optical axes: sum_i P_i (x - c_i) = 0,
    P_i = I - d_i d_i^T, c_i the camera's position and d_i its viewing direction."""
    if not cameras:
        return None
    rotation = np.array([pose.rotation for pose in cameras]).reshape(-1, 3, 3)
    translation = np.array([pose.translation for pose in cameras])
    place = -np.einsum("nij,ni->nj", rotation, translation)
    axis = rotation[:, 2]
    across = np.eye(3) - np.einsum("ni,nj->nij", axis, axis)
    if np.linalg.eigvalsh(across.mean(axis=0))[0] < _AXES_SPREAD:
        return None
    centre = np.linalg.solve(across.sum(axis=0), np.einsum("nij,nj->i", across, place))
    in_front = (np.einsum("ni,ni->n", axis, centre - place) > 0).mean()
    return centre if in_front > 0.5 else None


def _pose(image: Image, cameras: dict[int, Camera]) -> Pose:
    if image.camera_id not in cameras:
        raise ColmapError(f"image '{image.name}' names camera {image.camera_id}, which is not in the model")
    try:
        rotation = Rotation.from_quat(image.quaternion, scalar_first=True).as_matrix()
    except ValueError as error:
        raise ColmapError(f"image '{image.name}' has no valid rotation: {error}") from None
    camera = cameras[image.camera_id]
    if not np.isfinite([*rotation.flat, *image.translation, *camera.focal, *camera.centre]).all():
        raise ColmapError(f"image '{image.name}' or its camera has non-finite numbers")
    rows = tuple(float(value) for value in rotation.reshape(-1))
    return Pose(rows, image.translation, camera.focal, camera.centre)  # type: ignore[arg-type]
