"""uCO3D: a small folder in the published layout, with videos; its frames, masks, cameras, captions and subsets."""

import sqlite3
import struct

import numpy as np
import pytest
from PIL import Image

from pipelines.curate.worker import CurateParams, CurateWorker
from pipelines.photos.decode import decode_image, decode_mask_image
from pipelines.photos.roots import Root
from pipelines.sources import open_source
from pipelines.sources.turntables.uco3d import noun_of
from runtime.errors import UserError
from tests.world.photos import blocks
from tests.world.turntables import on_a_ring, pixel_of
from tests.world.videos import video

WIDTH, HEIGHT, RATE = 96, 72, 10
SHOWN = [blocks(n, WIDTH, HEIGHT) for n in range(12)]
FRAMES = """CREATE TABLE frame_annots (sequence_name TEXT, frame_number INTEGER, frame_timestamp FLOAT,
    _image_path TEXT, _image_size BLOB, _mask_path TEXT, _viewpoint_R BLOB, _viewpoint_T BLOB,
    _viewpoint_focal_length BLOB, _viewpoint_principal_point BLOB, _viewpoint_colmap_distortion_coeffs BLOB,
    _viewpoint_intrinsics_format TEXT)"""
SEQUENCES = """CREATE TABLE sequence_annots (sequence_name TEXT, category TEXT, super_category TEXT, _video_path TEXT,
    _mask_video_path TEXT, _reconstruction_quality_viewpoint FLOAT, _caption_text TEXT, _short_caption_text TEXT)"""


def floats(*values) -> bytes:
    return struct.pack(f"{len(values)}f", *values)


def frame(sequence, number, time, **changes):
    rotation, translation = on_a_ring(number)
    row = {
        "sequence_name": sequence,
        "frame_number": number,
        "frame_timestamp": time,
        "_image_size": struct.pack("ii", HEIGHT, WIDTH),
        "_viewpoint_R": floats(*rotation.ravel()),
        "_viewpoint_T": floats(*translation),
        "_viewpoint_focal_length": floats(2.0, 2.5),
        "_viewpoint_principal_point": floats(0.1, -0.2),
        "_viewpoint_intrinsics_format": "ndc_isotropic",
    }
    return row | changes


def sequence(name, category="toy_car", **changes):
    place = f"toys/{category}/{name}"
    row = {
        "sequence_name": name,
        "category": category,
        "super_category": "toys",
        "_video_path": f"{place}/rgb_video.mp4",
        "_mask_video_path": f"{place}/mask_video.mkv",
        "_reconstruction_quality_viewpoint": 0.9,
        "_caption_text": "A long text. It goes on.",
        "_short_caption_text": "a red toy car on a table",
    }
    return row | changes


def insert(connection, table, row):
    places = ", ".join("?" for _ in row)
    connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({places})", list(row.values()))


@pytest.fixture
def database(tmp_path):
    """`database([frame, ...], [sequence, ...])` writes metadata.sqlite."""

    def make(frames, sequences):
        (tmp_path / "metadata.sqlite").unlink(missing_ok=True)
        with sqlite3.connect(tmp_path / "metadata.sqlite") as connection:
            connection.execute(FRAMES)
            connection.execute(SEQUENCES)
            for row in frames:
                insert(connection, "frame_annots", row)
            for row in sequences:
                insert(connection, "sequence_annots", row)
        connection.close()

    return make


@pytest.fixture
def cars(database, put):
    """A capture of twelve frames, of which four are annotated, at times that are not quite theirs; one not on disk."""
    masks = [Image.new("L", (WIDTH, HEIGHT)) for _ in range(12)]
    for n, mask in enumerate(masks):
        mask.paste(255, (n, 8, n + 20, 40))
    put("toys/toy_car/1-2-3/rgb_video.mp4", content=video(SHOWN, qscale="2", rate=RATE))
    put("toys/toy_car/1-2-3/mask_video.mkv", content=video(masks, kind="matroska", codec="ffv1", pixels="gray"))
    rows = [frame("1-2-3", n, 0.3 * n + 0.004) for n in range(4)]
    database([*rows, frame("9-9-9", 0, 0.0)], [sequence("9-9-9"), sequence("1-2-3")])


def subjects(params, **changes):
    return list(open_source(params("uco3d").model_copy(update=changes)).subjects())


def test_annotated_frames_of_a_video_are_the_photos_of_a_subject(cars, params, caplog):
    (subject,) = subjects(params)
    assert (subject.subject_id, subject.class_name) == ("s/toys/toy_car/1-2-3", "toy car")
    assert [(p.frame_id, p.path, p.mask_path) for p in subject.photos[:2]] == [
        (
            f"s/toys/toy_car/1-2-3/00000{n}",
            f"toys/toy_car/1-2-3/rgb_video.mp4/~{time}",
            f"toys/toy_car/1-2-3/mask_video.mkv/~{time}",
        )
        for n, time in enumerate(("0.004000", "0.304000"))
    ]
    first = subject.photos[0]
    assert first.caption == "a red toy car on a table" and first.licence == "CC-BY-4.0" and "uCO3D" in first.attribution
    assert np.allclose(subject.centre, [1, 2, 3], atol=1e-4)
    assert "of 2 annotated captures are not read: 1 not on disk" in caplog.text


def test_photo_and_mask_are_the_frames_nearest_to_the_annotated_time(cars, params, tmp_path):
    root = Root(str(tmp_path))
    for number, photo in enumerate(subjects(params)[0].photos):
        found = np.asarray(decode_image(root.read(photo.path)), dtype=float)
        away = [np.abs(found - np.asarray(image.convert("RGB"), dtype=float)).mean() for image in SHOWN]
        assert int(np.argmin(away)) == 3 * number
        mask = decode_mask_image(root.read(photo.mask_path))
        assert mask.shape == (HEIGHT, WIDTH)
        assert (np.flatnonzero(mask.any(axis=0))[[0, -1]] == [3 * number, 3 * number + 19]).all()
        assert root.info(photo.path) == root.info("toys/toy_car/1-2-3/rgb_video.mp4")


def test_frames_pass_curate_with_their_camera_caption_and_licence(cars, params, section):
    source = params("uco3d")
    (subject,) = subjects(params)
    rows = CurateWorker(section("curate", CurateParams), [source]).curate(subject)
    assert not rows["rejects"] and len(rows["frames"]) == 4
    first = rows["frames"][0]
    assert (first["path"], first["mask_path"]) == (subject.photos[0].path, subject.photos[0].mask_path)
    assert (first["width"], first["height"], first["caption"]) == (WIDTH, HEIGHT, "a red toy car on a table")
    assert first["licence"] == "CC-BY-4.0" and first["rotation"] and first["mask_sha256"]


def test_cameras_see_the_world_where_pytorch3d_says(cars, params):
    for number, photo in enumerate(subjects(params)[0].photos):
        rotation, translation = on_a_ring(number)
        for point in np.array([[1, 2, 3], [1.3, 2, 3], [1, 2.4, 3]], dtype=float):
            seen = point @ rotation + translation
            x, y = np.array([2.0, 2.5]) * seen[:2] / seen[2] + np.array([0.1, -0.2])
            expected = (WIDTH / 2 - HEIGHT / 2 * x, HEIGHT / 2 - HEIGHT / 2 * y)
            assert pixel_of(photo.pose, point) == pytest.approx(expected, abs=1e-3)


def test_what_is_not_annotated_is_left_open(database, put, params):
    put("toys/bow_(weapon)/1/rgb_video.mp4", "toys/x/2/rgb_video.mp4")
    rows = [
        frame("1", 0, None, _viewpoint_R=None),
        frame("1", 1, 0.5, _viewpoint_intrinsics_format=None),
        frame("2", 0, 0.0),
    ]
    nameless = sequence("2", "x", _short_caption_text="") | {"category": None}
    bare = {"_short_caption_text": None, "_caption_text": None, "_mask_video_path": None}
    database(rows, [sequence("1", "bow_(weapon)", **bare), nameless])
    named, other = subjects(params)
    first, second = named.photos
    assert named.class_name == "bow" and (first.caption, first.mask_path, first.pose) == (None, None, None)
    assert second.pose.focal == pytest.approx((72, 90))
    assert (first.reject, first.reject_detail, second.reject) == ("no_annotation", "no time", None)
    (photo,) = other.photos
    assert (photo.reject, photo.reject_detail) == ("no_annotation", "no category")
    assert (photo.caption, photo.mask_path) == ("A long text. It goes on.", None)


def test_subsets_by_class_quality_and_number_of_views(cars, params, caplog):
    assert not subjects(params, classes=("apple",)) and len(subjects(params, classes=("Toy car",))) == 1
    assert not subjects(params, min_quality=0.95)
    assert "2 below min_quality 0.95 or without a score" in caplog.text
    assert [p.frame_id[-1] for p in subjects(params, views=2)[0].photos] == ["0", "2"]


def test_database_that_is_none_is_named(put, params):
    put("metadata.sqlite", content=b"not a database" * 100)
    with pytest.raises(UserError, match=r"metadata.sqlite is not uCO3D's database \(.*\); download it again"):
        subjects(params)
    (put() / "metadata.sqlite").unlink()
    with pytest.raises(UserError, match=r"metadata.sqlite is missing; it has the captures"):
        subjects(params)


def test_root_of_the_set_is_recognised(cars, params):
    with pytest.raises(UserError, match=r"is no root of layout folder: it has metadata.sqlite; use layout uco3d"):
        open_source(params("folder"))


def test_nouns_leave_out_what_lvis_adds_in_parentheses():
    assert [noun_of(name) for name in ("toy_car", "bow_(decorative_ribbons)", "Apple")] == ["toy car", "bow", "apple"]
