"""CO3Dv2: a small folder in the published layout, its cameras against PyTorch3D's convention, and its subsets."""

import gzip
import io
import json

import numpy as np
import pytest

from pipelines.sources import SourceParams, open_source
from pipelines.sources.turntables.cameras import BY_SIDE, ISOTROPIC, pose
from pipelines.sources.turntables.co3d import json_list
from runtime.errors import UserError
from runtime.params import parse
from tests.world.turntables import on_a_ring, pixel_of

SIZE = (40, 60)  # height, width


def viewpoint(number, **changes):
    rotation, translation = on_a_ring(number)
    view = {"R": rotation.tolist(), "T": translation.tolist(), "focal_length": [2.0, 2.5]}
    return view | {"principal_point": [0.1, -0.2], "intrinsics_format": ISOTROPIC} | changes


def entry(sequence, number, category="teddybear", **changes):
    place = f"{category}/{sequence}"
    found = {
        "sequence_name": sequence,
        "frame_number": number,
        "frame_timestamp": 0.1 * number,
        "image": {"path": f"{place}/images/frame{number + 1:06d}.jpg", "size": list(SIZE)},
        "depth": {"path": f"{place}/depths/frame{number + 1:06d}.jpg.geometric.png", "scale_adjustment": 1.0},
        "mask": {"path": f"{place}/masks/frame{number + 1:06d}.png", "mass": 9.0},
        "viewpoint": viewpoint(number),
        "meta": None,
    }
    return found | changes


@pytest.fixture
def category(put):
    """`category([...], {"1_2_3": 0.9})` writes the annotations of teddybear, or another `name`."""

    def make(frames, qualities, name="teddybear"):
        rows = [{"sequence_name": s, "category": name, "viewpoint_quality_score": q} for s, q in qualities.items()]
        put(f"{name}/frame_annotations.jgz", content=gzip.compress(json.dumps(frames).encode()))
        put(f"{name}/sequence_annotations.jgz", content=gzip.compress(json.dumps(rows).encode()))
        put(f"{name}/set_lists/set_lists_fewview_dev.json", content="{}")

    return make


@pytest.fixture
def bears(category, put):
    """Three captures: a good one of four frames, a poor one, and one that was not downloaded."""
    frames = [entry("1_2_3", n) for n in range(4)] + [entry("4_5_6", n) for n in range(2)] + [entry("7_8_9", 0)]
    category(frames, {"1_2_3": 0.9, "4_5_6": 0.2, "7_8_9": 0.9})
    for sequence, count in (("1_2_3", 4), ("4_5_6", 2)):
        put(*(f"teddybear/{sequence}/images/frame{n + 1:06d}.jpg" for n in range(count)))
        put(*(f"teddybear/{sequence}/masks/frame{n + 1:06d}.png" for n in range(count)))


def subjects(params, **changes):
    return list(open_source(params("co3d").model_copy(update=changes)).subjects())


def test_every_sequence_is_a_subject_with_masks_cameras_and_licence(bears, params, caplog):
    first, second = subjects(params)
    assert (first.subject_id, first.class_name, first.split) == ("s/teddybear/1_2_3", "teddy bear", "train")
    assert [(p.frame_id, p.path, p.mask_path) for p in first.photos[:2]] == [
        (
            f"s/teddybear/1_2_3/frame00000{n}",
            f"teddybear/1_2_3/images/frame00000{n}.jpg",
            f"teddybear/1_2_3/masks/frame00000{n}.png",
        )
        for n in (1, 2)
    ]
    assert {p.licence for p in first.photos} == {"CC-BY-NC-4.0"} and "CO3Dv2" in first.photos[0].attribution
    assert [p.pose is not None for p in first.photos] == [True] * 4 and not any(p.reject for p in first.photos)
    assert np.allclose(first.centre, [1, 2, 3], atol=1e-5)  # what the ring looks at
    assert len(second.photos) == 2
    assert "of 3 annotated captures are not read: 1 not on disk" in caplog.text


def test_cameras_see_the_world_where_pytorch3d_says(bears, params):
    for number, photo in enumerate(subjects(params)[0].photos):
        rotation, translation = on_a_ring(number)
        for point in np.array([[1, 2, 3], [1.3, 2, 3], [1, 2.4, 3], [1.2, 1.9, 3.5]], dtype=float):
            # PyTorch3D: rows times R; x to the left, y up; NDC with 1 = half the shorter side, from the centre.
            seen = point @ rotation + translation
            x, y = np.array([2.0, 2.5]) * seen[:2] / seen[2] + np.array([0.1, -0.2])
            assert pixel_of(photo.pose, point) == pytest.approx((30 - 20 * x, 20 - 20 * y), abs=1e-4)


def test_both_ndc_conventions_give_focal_length_and_centre_in_px():
    eye, nowhere = np.eye(3), np.zeros(3)
    isotropic = pose(eye, nowhere, (2, 2), (0.5, 0.25), SIZE, ISOTROPIC)
    assert isotropic.focal == (40, 40) and isotropic.centre == (30 - 10, 20 - 5)  # px of half of 40
    by_side = pose(eye, nowhere, (2, 2), (0.5, 0.25), SIZE, BY_SIDE)
    assert by_side.focal == (60, 40) and by_side.centre == (30 - 15, 20 - 5)  # px of half of 60, and of 40
    assert isotropic.rotation == (-1, 0, 0, 0, -1, 0, 0, 0, 1)  # left becomes right, up becomes down


@pytest.mark.parametrize(
    "changes",
    [
        {"R": [[1, 0, 0], [0, 1, 0]]},
        {"R": [[2, 0, 0], [0, 1, 0], [0, 0, 1]]},
        {"T": [0, 0, float("nan")]},
        {"focal_length": None},
        {"intrinsics_format": "px"},
    ],
)
def test_numbers_that_are_no_camera_leave_the_photo_without_a_pose(category, put, params, changes):
    category([entry("1_2_3", 0, viewpoint=viewpoint(0, **changes)), entry("1_2_3", 1, viewpoint=None)], {"1_2_3": None})
    put("teddybear/1_2_3/images/frame000001.jpg", "teddybear/1_2_3/images/frame000002.jpg")
    (subject,) = subjects(params)
    assert [photo.pose for photo in subject.photos] == [None, None] and subject.centre is None


def test_intrinsics_without_a_format_are_by_side_as_the_published_types_say(category, put, params):
    view = viewpoint(0)
    del view["intrinsics_format"]
    category([entry("1_2_3", 0, viewpoint=view)], {"1_2_3": 1.0})
    put("teddybear/1_2_3/images/frame000001.jpg")
    assert subjects(params)[0].photos[0].pose.focal == pytest.approx((60, 50))


def test_every_photo_is_accounted_for(bears, put, params):
    put("teddybear/1_2_3/images/frame000009.jpg", "teddybear/1_2_3/images/notes.txt")
    root = put("teddybear/1_2_3/masks/frame000009.png")
    (root / "teddybear/1_2_3/images/frame000002.jpg").unlink()
    (root / "teddybear/1_2_3/masks/frame000003.png").unlink()
    photos = {photo.frame_id.rpartition("/")[2]: photo for photo in subjects(params)[0].photos}
    assert {name: photo.reject for name, photo in photos.items() if photo.reject} == {
        "frame000002": "missing_file",
        "notes": "not_an_image",
    }
    assert photos["frame000009"].pose is None and photos["frame000009"].mask_path
    assert photos["frame000003"].mask_path is None and photos["frame000003"].pose


def test_subsets_by_class_quality_and_number_of_views(bears, category, put, params, caplog):
    category([entry("1_1_1", 0, "apple")], {"1_1_1": None}, "apple")
    put("apple/1_1_1/images/frame000001.jpg")
    assert [s.class_name for s in subjects(params)] == ["apple", "teddy bear", "teddy bear"]
    for classes in (("Teddy_Bear",), ("teddybear",)):
        assert {s.class_name for s in subjects(params, classes=classes)} == {"teddy bear"}
    (good,) = subjects(params, min_quality=0.5)
    assert good.subject_id == "s/teddybear/1_2_3"
    assert "2 below min_quality 0.5 or without a score" in caplog.text
    few = subjects(params, views=2)[1].photos
    assert [photo.frame_id[-1] for photo in few] == ["1", "3"]


def test_files_that_are_no_annotations_are_named(bears, put, params):
    for content in (b"[]", gzip.compress(b"{}"), gzip.compress(b'[{"a": 1}]'), gzip.compress(b'[{"sequence_name": "')):
        put("teddybear/frame_annotations.jgz", content=content)
        with pytest.raises(
            UserError, match=r"teddybear/frame_annotations.jgz is not CO3D's annotation file .*; download"
        ):
            subjects(params)
    (put() / "teddybear/sequence_annotations.jgz").unlink()
    with pytest.raises(UserError, match=r"sequence_annotations.jgz is missing; it has the captures' quality scores"):
        subjects(params)
    (put() / "teddybear/frame_annotations.jgz").unlink()
    with pytest.raises(UserError, match=r"has no <category>/frame_annotations.jgz; unpack CO3Dv2 there"):
        subjects(params)


def test_lists_are_read_entry_by_entry_across_chunks(monkeypatch):
    rows = [{"a": "ä" * n, "b": [n, None, {"c": 1.5}]} for n in range(40)] + [12, 345]
    monkeypatch.setattr("pipelines.sources.turntables.co3d._CHUNK", 7)
    for text in (json.dumps(rows, ensure_ascii=False), json.dumps(rows, indent=2)):
        assert list(json_list(io.BytesIO(text.encode()))) == rows
    assert list(json_list(io.BytesIO(b" [ ] "))) == []
    for bad in (b"[1, 2", b"", b'{"a": 1}', b"[1, x]"):
        with pytest.raises(ValueError, match=r"cut off|no list|Expecting"):
            list(json_list(io.BytesIO(bad)))


def test_keys_of_turntables_are_refused_elsewhere():
    source = {"name": "s", "layout": "folder", "root": "photos", "split": "train", "views": 3}
    with pytest.raises(UserError, match=r"views is for the layouts co3d and uco3d, not folder; correct it"):
        parse("sources", [source], list[SourceParams])
