import io
import logging
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest

from pipelines.photos.decode import decode_image, decode_mask_image
from pipelines.photos.roots import Root
from pipelines.sources import SourceParams, open_source
from runtime.errors import UserError

CATEGORIES = "0,bag\r\n 17 , Mug \r\n\r\n2,wahser\r\n204,Toy duck\r\n"

CAMERAS = "1 SIMPLE_RADIAL 8 6 10 4 3 0.1\n"
IMAGES = "# header\n7 1 0 0 0 0 0 2 1 images/002.jpg\n1 2 -1\n3 0 1 0 0 0 0 2 1 000.png\n\n"
POINTS = "1 0 0 1 9 9 9 0.1 1 1\n2 2 2 3 9 9 9 0.1 1 1\n"


@pytest.fixture
def subjects(put, params):
    put("mvimgnet_category.txt", content=CATEGORIES)
    return lambda: list(open_source(params("mvimgnet")).subjects())


def test_videos_become_subjects_in_id_order(put, subjects):
    put("17/b/images/001.jpg", "17/b/images/000.jpg", "17/a/images/000.jpg", "204/a/images/000.jpg", "README.md")
    put("captions.csv", content="path,caption\n17/b/images/001.jpg,a red mug\n")
    found = subjects()
    assert [(s.subject_id, s.class_name) for s in found] == [
        ("s/17/a", "mug"),
        ("s/17/b", "mug"),
        ("s/204/a", "toy duck"),
    ]
    assert [(p.frame_id, p.path, p.caption) for p in found[1].photos] == [
        ("s/17/b/000", "17/b/images/000.jpg", None),
        ("s/17/b/001", "17/b/images/001.jpg", "a red mug"),
    ]


def test_masks_go_by_stem_or_whole_name(put, subjects):
    put("0/v/images/000.jpg", "0/v/images/001.jpg", "0/v/images/002.jpg", "0/v/masks/000.png", "0/v/masks/001.jpg.png")
    assert [p.mask_path for p in subjects()[0].photos] == ["0/v/masks/000.png", "0/v/masks/001.jpg.png", None]


def test_masks_are_found_whatever_the_case_of_their_suffix_and_reported_without_a_photo(put, subjects, caplog):
    put("0/v/images/000.jpg", "0/v/images/001.jpg", "0/v/masks/000.PNG", "0/v/masks/001.JPG.png", "0/v/masks/002.png")
    assert [p.mask_path for p in subjects()[0].photos] == ["0/v/masks/000.PNG", "0/v/masks/001.JPG.png"]
    assert "1 mask matches no photo: " in caplog.text and "0/v/masks/002.png; name" in caplog.text


def test_photos_in_a_deeper_folder_and_two_photos_with_one_mask_are_named(put, subjects):
    put("0/v/images/a/000.jpg")
    with pytest.raises(UserError, match=r"images/a/000.jpg' lies deeper than <class id>/<video id>/images/"):
        subjects()
    put("0/u/images/000.jpg", "0/u/images/000.png", "0/u/masks/000.png")
    with pytest.raises(UserError, match=r"one mask, 0/u/masks/000.png, for the photos 000.jpg and 000.png"):
        subjects()


def test_frames_missing_from_the_sparse_model_have_no_pose(put, subjects):
    put("0/v/images/000.jpg", "0/v/images/001.jpg", "0/v/images/002.jpg")
    for name, content in (("cameras", CAMERAS), ("images", IMAGES), ("points3D", POINTS)):
        put(f"0/v/sparse/0/{name}.txt", content=content)
    (subject,) = subjects()
    poses = [photo.pose for photo in subject.photos]
    assert poses[1] is None
    assert poses[2].rotation == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert np.allclose(poses[0].rotation, (1, 0, 0, 0, -1, 0, 0, 0, -1))
    assert (poses[0].translation, poses[0].focal, poses[0].centre) == ((0, 0, 2), (10, 10), (4, 3))
    assert subject.centre is not None


def test_broken_sparse_model_costs_the_poses_and_not_the_photos(put, subjects, caplog):
    put("0/v/images/000.jpg", "0/v/sparse/0/cameras.bin")
    put("0/v/sparse/0/images.bin", content=b"\x01\0")
    with caplog.at_level(logging.WARNING):
        (subject,) = subjects()
    assert (len(subject.photos), subject.photos[0].pose, subject.centre) == (1, None, None)
    assert "0/v/sparse/0/cameras.bin" in caplog.text


def test_sparse_model_that_an_archive_holds_damaged_costs_the_poses_and_not_the_photos(put, tmp_path, subjects, caplog):
    put("placeholder")
    damaged = b"a camera of which a bit has turned"
    with zipfile.ZipFile(tmp_path / "mvi_00.zip", "w") as archive:
        for name in ("images/000.jpg", "sparse/0/images.bin"):
            archive.writestr(f"0/v/{name}", name)
        archive.writestr("0/v/sparse/0/cameras.bin", damaged)
    whole = (tmp_path / "mvi_00.zip").read_bytes()
    (tmp_path / "mvi_00.zip").write_bytes(whole.replace(damaged, damaged.upper()))
    (subject,) = subjects()
    assert [(p.path, p.pose) for p in subject.photos] == [("mvi_00.zip/0/v/images/000.jpg", None)]
    assert "damaged at 0/v/sparse/0/cameras.bin" in caplog.text


def test_overlapping_archives_are_one_subject_each(put, subjects):
    put("mvi_00/17/v/images/000.jpg", "mvi_00/17/v/images/001.jpg", "mvi_01/17/v/images/001.jpg")
    put("mvi_01/17/v/images/002.jpg", "mvi_01/17/v/masks/000.png", "mvi_01/0/v/images/000.jpg", "notes/a.txt")
    bag, mug = subjects()
    assert (bag.subject_id, mug.subject_id) == ("s/0/v", "s/17/v")
    assert [p.path for p in mug.photos] == [
        "mvi_00/17/v/images/000.jpg",
        "mvi_00/17/v/images/001.jpg",
        "mvi_01/17/v/images/002.jpg",
    ]
    assert mug.photos[0].mask_path == "mvi_01/17/v/masks/000.png"


def tar(path, *names):
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))


def test_archives_are_read_in_place_and_overlap_like_folders(put, tmp_path, subjects):
    """A part, the archive of a class, and the masks apart: one video in all of them is one subject."""
    put("placeholder")
    tar(tmp_path / "mvi_00.tar", "17/v/images/000.jpg", "17/v/images/001.jpg", "0/w/images/000.jpg")
    tar(tmp_path / "17.tar", "./17/v/images/001.jpg", "./17/v/images/002.jpg", "./17/x/images/000.jpg")
    with zipfile.ZipFile(tmp_path / "MVImgNet_mask.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("17/v/001.jpg.png", b"mask" * 9)
    bag, mug, other = subjects()
    assert (bag.subject_id, mug.subject_id, other.subject_id) == ("s/0/w", "s/17/v", "s/17/x")
    assert [p.path for p in mug.photos] == [
        "mvi_00.tar/17/v/images/000.jpg",
        "17.tar/17/v/images/001.jpg",
        "17.tar/17/v/images/002.jpg",
    ]
    assert [p.mask_path for p in mug.photos] == [None, "MVImgNet_mask.zip/17/v/001.jpg.png", None]
    root = Root(str(tmp_path))
    assert root.read(mug.photos[1].path) == b"./17/v/images/001.jpg"
    assert root.read(mug.photos[1].mask_path) == b"mask" * 9


def test_archive_beside_what_it_unpacked_to_is_not_read_again(put, tmp_path, subjects):
    put("mvi_00/17/v/images/000.jpg")
    tar(tmp_path / "mvi_00.tar", "17/v/images/000.jpg")
    assert [p.path for s in subjects() for p in s.photos] == ["mvi_00/17/v/images/000.jpg"]


def test_whole_set_in_one_archive_reads_as_the_folder_does(put, tmp_path, params, subjects):
    put("17/v/images/000.jpg", "17/v/images/001.jpg", "17/v/masks/000.png")
    for name, content in (("cameras", CAMERAS), ("images", IMAGES), ("points3D", POINTS)):
        put(f"17/v/sparse/0/{name}.txt", content=content)
    packed = tmp_path.parent / f"{tmp_path.name}.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted(tmp_path.rglob("*.*")):
            archive.write(file, f"mv/{file.relative_to(tmp_path)}")
    found = list(open_source(params("mvimgnet", root=packed / "mv")).subjects())
    assert found == subjects() != []


def test_foreign_file_among_the_images_is_a_reject(put, subjects):
    put("0/v/images/000.jpg", "0/v/images/log.txt", "0/v/images/.x.jpg")
    assert [p.reject for p in subjects()[0].photos] == [None, "not_an_image"]


def test_video_without_images_has_no_photos(put, subjects):
    put("0/v/masks/000.png")
    assert subjects()[0].photos == ()


def test_unknown_class_id_is_named_with_its_file(put, subjects):
    put("0/v/images/000.jpg", "99/w/images/000.jpg")
    with pytest.raises(UserError, match=r"mvimgnet_category\.txt has no class id 99, but folder '99/w' exists"):
        subjects()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0,bag\n1\n", "line 2 is '1'"),
        ("0,bag\nx,mug\n", "line 2 is 'x,mug'"),
        ("0,bag\n1, \n", "line 2"),
        ("0,bag\n0,mug\n", "line 2 names class id 0 again"),
    ],
)
def test_malformed_category_list_is_named_by_line(put, subjects, content, message):
    put("0/v/images/000.jpg")
    put("mvimgnet_category.txt", content=content)
    with pytest.raises(UserError, match=message):
        subjects()


def test_real_photographs(real_data):
    root = str(real_data / "multiview")
    source = open_source(SourceParams(name="mv", layout="mvimgnet", root=root, split="train"))
    found = list(source.subjects())
    photos = [photo for subject in found for photo in subject.photos]
    assert (len(found), len(photos), len({p.frame_id for p in photos})) == (80, 1288, 1288)
    assert sum(all(p.mask_path for p in s.photos) for s in found) == 71
    assert sum(any(p.pose for p in s.photos) for s in found) == sum(s.centre is not None for s in found) == 14
    assert Counter(s.class_name for s in found)["mug"] == 10
    registered = {s.subject_id: sum(p.pose is not None for p in s.photos) for s in found}
    assert (registered["mv/14/plant_pot"], registered["mv/17/tankard_maryrose"]) == (15, 20)
    assert not any(p.reject for p in photos)


def test_centre_of_real_objects_falls_on_their_masks(real_data):
    root = Root(str(real_data / "multiview"))
    found = open_source(SourceParams(name="mv", layout="mvimgnet", root=root.url, split="train")).subjects()
    tried = 0
    for subject in found:
        for photo in [p for p in subject.photos if p.pose and p.mask_path][:3]:
            mask = decode_mask_image(root.read(photo.mask_path))
            image = decode_image(root.read(photo.path))
            assert mask.shape == (image.height, image.width)
            rotation = np.reshape(photo.pose.rotation, (3, 3))
            x, y, depth = rotation @ np.array(subject.centre) + photo.pose.translation
            (fx, fy), (cx, cy) = photo.pose.focal, photo.pose.centre
            assert depth > 0
            assert mask[int(fy * y / depth + cy), int(fx * x / depth + cx)], photo.frame_id
            tried += 1
    assert tried == 15
