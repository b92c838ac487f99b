import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from pipelines.photos.roots import Root
from pipelines.sources import colmap
from pipelines.sources.base import Pose
from pipelines.sources.colmap import CAMERA_MODELS, Camera, ColmapError, Image, Model

number = st.floats(-1e6, 1e6)
names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12)


@st.composite
def cameras(draw):
    model, parameters = draw(st.sampled_from(CAMERA_MODELS))
    side = st.integers(1, 10_000)
    return Camera(model, draw(side), draw(side), tuple(draw(st.tuples(*[number] * parameters))))


quaternions = st.tuples(number, number, number, number).filter(lambda q: max(map(abs, q)) > 1e-3)


@st.composite
def models(draw):
    intrinsics = draw(st.dictionaries(st.integers(1, 2**31 - 1), cameras(), min_size=1, max_size=3))
    images = st.builds(
        Image,
        st.builds(" ".join, st.lists(names, min_size=1, max_size=2)),
        quaternions,
        st.tuples(number, number, number),
        st.sampled_from(sorted(intrinsics)),
    )
    points = draw(st.lists(st.tuples(number, number, number), max_size=4))
    return Model(intrinsics, tuple(draw(st.lists(images, max_size=4))), lambda: np.array(points).reshape(-1, 3))


def binary_files(model: Model) -> dict[str, bytes]:
    ids = {name: number for number, (name, _) in enumerate(CAMERA_MODELS)}
    intrinsics = [
        struct.pack(f"<iiQQ{len(c.parameters)}d", i, ids[c.model], c.width, c.height, *c.parameters)
        for i, c in model.cameras.items()
    ]
    images = [
        struct.pack("<i7di", n, *image.quaternion, *image.translation, image.camera_id)
        + image.name.encode()
        + b"\0"
        + struct.pack("<Q", n)
        + struct.pack("<ddq", 1.5, 2.5, -1) * n
        for n, image in enumerate(model.images)
    ]
    points = [
        struct.pack("<Q3d3BdQ", n, *point, 1, 2, 3, 0.5, n) + struct.pack("<ii", 1, 2) * n
        for n, point in enumerate(model.points)
    ]
    parts = {"cameras.bin": intrinsics, "images.bin": images, "points3D.bin": points}
    return {name: struct.pack("<Q", len(part)) + b"".join(part) for name, part in parts.items()}


def text_files(model: Model) -> dict[str, bytes]:
    def row(*values) -> str:
        return " ".join(repr(v) if isinstance(v, float) else str(v) for v in values)

    intrinsics = [row(i, c.model, c.width, c.height, *c.parameters) for i, c in model.cameras.items()]
    images = []
    for n, image in enumerate(model.images):
        images += [row(n, *image.quaternion, *image.translation, image.camera_id, image.name), row(*[1.5, 2.5, -1] * n)]
    points = [row(n, *map(float, p), 1, 2, 3, 0.5, *[1, 2] * n) for n, p in enumerate(model.points)]
    parts = {"cameras.txt": intrinsics, "images.txt": images, "points3D.txt": points}
    return {name: "\n".join(["# a comment", *lines, ""]).encode() for name, lines in parts.items()}


def write(folder: Path, files: dict[str, bytes]) -> Root:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return Root(str(folder))


def read(folder: Path, files: dict[str, bytes]) -> Model:
    model = colmap.read_model(write(folder, files), "")
    assert model is not None
    return model


@settings(deadline=None, max_examples=60)
@given(model=models())
def test_binary_and_text_models_read_back_as_written(model, tmp_path_factory):
    for files in (binary_files(model), text_files(model)):
        found = read(tmp_path_factory.mktemp("model"), files)
        assert (found.cameras, found.images) == (model.cameras, model.images)
        assert np.array_equal(found.points, model.points)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_damaged_model_is_read_or_named(data, tmp_path_factory):
    model = data.draw(models())
    files = data.draw(st.sampled_from([binary_files, text_files]))(model)
    name = data.draw(st.sampled_from(sorted(files)))
    damaged = bytearray(files[name])
    for at in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 1)), max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))
    files[name] = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        found = read(tmp_path_factory.mktemp("model"), files)
        assert found.points.shape[1] == 3
        for pose in colmap.poses(found).values():
            assert np.isfinite([*pose.rotation, *pose.translation, *pose.focal, *pose.centre]).all()
    except ColmapError as error:
        assert len(str(error).splitlines()) == 1


@settings(deadline=None)
@given(quaternion=quaternions)
def test_rotation_of_a_pose_is_that_of_the_quaternion(quaternion):
    model = Model(
        {1: Camera("PINHOLE", 4, 4, (3.0, 4.0, 1.0, 2.0))},
        (Image("a", quaternion, (1, 2, 3), 1),),
        lambda: np.empty((0, 3)),
    )
    pose = colmap.poses(model)["a"]
    w, x, y, z = np.array(quaternion) / np.linalg.norm(quaternion)
    # https://colmap.github.io/format.html: Hamilton convention
    expected = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    assert np.allclose(np.reshape(pose.rotation, (3, 3)), expected, atol=1e-9)
    assert (pose.translation, pose.focal, pose.centre) == ((1, 2, 3), (3, 4), (1, 2))


@pytest.mark.parametrize(("model", "count"), CAMERA_MODELS)
def test_focal_length_and_principal_point_of_every_camera_model(model, count):
    camera = Camera(model, 8, 8, tuple(float(value) for value in range(10, 10 + count)))
    one_focal = model.startswith(("SIMPLE", "RADIAL"))
    assert camera.focal == ((10, 10) if one_focal else (10, 11))
    assert camera.centre == ((11, 12) if one_focal else (12, 13))


def test_folder_without_a_model_has_none(tmp_path):
    assert colmap.read_model(Root(str(tmp_path)), "sparse/0") is None


def test_model_without_points_has_none_of_them(tmp_path):
    files = binary_files(Model({}, (), lambda: np.empty((0, 3))))
    del files["points3D.bin"]
    assert read(tmp_path, files).points.shape == (0, 3)


def test_errors_name_file_image_and_camera(tmp_path):
    files = {"cameras.txt": b"1 PINHOLE 4 4 1 2 3\n", "images.txt": b""}
    with pytest.raises(ColmapError, match=r"cameras\.txt .*camera 1 .*PINHOLE"):
        read(tmp_path, files)
    lost = Model({}, (Image("a.jpg", (1, 0, 0, 0), (0, 0, 0), 5),), lambda: np.empty((0, 3)))
    with pytest.raises(ColmapError, match=r"'a\.jpg' names camera 5"):
        colmap.poses(lost)
    still = Model(
        {1: Camera("SIMPLE_PINHOLE", 1, 1, (1, 0, 0))}, (Image("b.jpg", (0, 0, 0, 0), (0, 0, 0), 1),), lost.read_points
    )
    with pytest.raises(ColmapError, match=r"'b\.jpg'"):
        colmap.poses(still)


def ring(centre: np.ndarray, degrees: float, count: int = 8) -> list[Pose]:
    """Cameras two units away that look at `centre` from an arc."""
    poses = []
    for angle in np.linspace(0, degrees, count, endpoint=False):
        rotation = Rotation.from_euler("y", angle, degrees=True).as_matrix()
        translation = np.array([0, 0, 2.0]) - rotation @ centre
        poses.append(Pose(tuple(rotation.flat), tuple(translation), (1, 1), (0, 0)))
    return poses


@settings(deadline=None, max_examples=30)
@given(centre=st.tuples(number, number, number), degrees=st.floats(60, 360))
def test_object_centre_is_where_the_cameras_look_whatever_the_background(centre, degrees):
    background = np.random.default_rng(0).normal(5, 9, (200, 3))
    found = colmap.object_centre(ring(np.array(centre), degrees), lambda: background)
    assert np.allclose(found, centre, atol=1e-4)


def test_object_centre_of_parallel_or_absent_cameras_is_the_median_point():
    points = np.array([[0, 0, 0], [1, 2, 3], [100, 100, 100], [np.nan, 0, 0]])
    for cameras in ([], ring(np.zeros(3), 5)):
        assert colmap.object_centre(cameras, lambda: points) == (1, 2, 3)
    assert colmap.object_centre([], lambda: np.empty((0, 3))) is None


def test_cameras_that_look_away_do_not_decide_the_centre():
    outward = []
    for angle in (0, 90, 180, 270):
        rotation = Rotation.from_euler("y", angle, degrees=True).as_matrix()
        outward.append(Pose(tuple(rotation.flat), (0, 0, -2), (1, 1), (0, 0)))
    assert colmap.object_centre(outward, lambda: np.ones((3, 3))) == (1, 1, 1)
