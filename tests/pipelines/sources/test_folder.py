import zipfile

import pytest

from pipelines.photos.decode import READS_HEIF
from pipelines.sources import open_source
from runtime.errors import UserError


def test_folders_become_subjects_with_class_masks_and_captions(put, params):
    put("stuffed_animal/bear/1.jpg", "stuffed_animal/bear/2.PNG", "stuffed_animal/bear/3.webp", "Mug/blue/front.jpeg")
    put("stuffed_animal/bear/1.mask.png", "stuffed_animal/bear/masks/2.png")
    put("captions.csv", content="path,caption\nMug/blue/front.jpeg,a mug on a table\n")
    mug, bear = open_source(params("folder")).subjects()
    assert (mug.subject_id, mug.class_name, mug.source, mug.split) == ("s/Mug/blue", "mug", "s", "train")
    assert [(p.frame_id, p.path, p.caption) for p in mug.photos] == [
        ("s/Mug/blue/front", "Mug/blue/front.jpeg", "a mug on a table")
    ]
    assert bear.class_name == "stuffed animal"
    assert [(p.frame_id.rpartition("/")[2], p.mask_path) for p in bear.photos] == [
        ("1", "stuffed_animal/bear/1.mask.png"),
        ("2", "stuffed_animal/bear/masks/2.png"),
        ("3", None),
    ]
    assert not any(p.reject for p in (*mug.photos, *bear.photos))


def test_hidden_files_are_ignored_and_foreign_files_are_rejects(put, params):
    put("mug/blue/1.jpg", "mug/blue/.DS_Store", "mug/blue/Thumbs.db", "mug/blue/raw/9.txt", "mug/blue/notes.txt")
    put(".cache/x/1.jpg", "mug/.x/1.jpg", "mug/readme.md", "readme.md")
    (mug,) = open_source(params("folder")).subjects()
    assert [(p.frame_id, p.reject) for p in mug.photos] == [
        ("s/mug/blue/1", None),
        ("s/mug/blue/notes", "not_an_image"),
    ]
    assert mug.photos[1].reject_detail == "suffix '.txt', captions belong in captions.csv at the root"


@pytest.mark.skipif(READS_HEIF, reason="pillow-heif is installed")
def test_heic_names_the_package_that_reads_it(put, params):
    put("mug/blue/1.HEIC")
    (mug,) = open_source(params("folder")).subjects()
    assert mug.photos[0].reject_detail == "suffix '.HEIC', read once the package pillow-heif is installed"


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("1.CR2", "suffix '.CR2', save it as JPEG or PNG"),
        ("1.svg", "suffix '.svg', save it as JPEG or PNG"),
        ("1", "suffix ''"),
    ],
)
def test_rejects_of_other_formats_say_what_to_do(put, params, name, detail):
    put(f"mug/blue/{name}")
    (mug,) = open_source(params("folder")).subjects()
    assert (mug.photos[0].reject, mug.photos[0].reject_detail) == ("not_an_image", detail)


def test_class_folder_that_is_not_utf_8_is_no_noun(put, params, tmp_path):
    put("mug/blue/1.jpg")
    (tmp_path / "mug").rename(tmp_path / "caf\udce9")
    with pytest.raises(UserError, match="caf\ufffd' is not UTF-8, so it is no class noun; rename it"):
        list(open_source(params("folder")).subjects())


@pytest.mark.parametrize("name", ["_", "__ _"])
def test_class_folder_without_a_letter_is_no_noun(put, params, name):
    put(f"{name}/blue/1.jpg")
    with pytest.raises(UserError, match=rf"folder '.*/{name}' has no letter, so it is no class noun; rename it"):
        list(open_source(params("folder")).subjects())


@pytest.mark.parametrize("path", ["cup.zip", "cup.TAR.GZ", "mug/red.tar", "mug/red.7z", "mug/blue/raw/x.zip"])
def test_archives_that_are_not_read_are_reported(put, params, caplog, path):
    put("mug/blue/1.jpg", path, "old.zip", "old/a/1.jpg", "mug/._x.zip")
    assert len(list(open_source(params("folder")).subjects())) == 2
    assert f"{path} is skipped: this layout reads an archive only as the root; unpack it" in caplog.text
    assert caplog.text.count("is skipped") == 1


def test_subject_ids_begin_the_ids_of_their_photos(put, params):
    put("b/x/1.jpg", "a/y/1.jpg", "a/x/1.jpg", "a/x/1.png")
    subjects = list(open_source(params("folder")).subjects())
    assert [s.subject_id for s in subjects] == ["s/a/x", "s/a/y", "s/b/x"]
    assert all(p.frame_id.rpartition("/")[0] == s.subject_id for s in subjects for p in s.photos)
    assert len({p.frame_id for s in subjects for p in s.photos}) == 4


@pytest.mark.parametrize("path", ["1.jpg", "mug/1.jpg"])
def test_photo_outside_a_subject_folder_is_named(put, params, path):
    put("mug/blue/1.jpg", path)
    with pytest.raises(UserError, match=rf"{path}' is not in a subject folder; move it"):
        list(open_source(params("folder")).subjects())


@pytest.mark.parametrize(
    "path", ["mug/blue/raw/9.jpg", "mug/blue/masks of/x/9.PNG", "mug/red/images/1.jpg", "mug/blue/masks/x/1.png"]
)
def test_photo_in_a_deeper_folder_is_named(put, params, path):
    put("mug/blue/1.jpg", path)
    with pytest.raises(UserError, match=rf"{path}' lies deeper than <class noun>/<subject>/(masks/)?; move it"):
        list(open_source(params("folder")).subjects())


def test_archive_with_one_folder_around_everything_is_named_and_its_folder_can_be_the_root(tmp_path, params):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("photos/mug/red/1.jpg", b"")
    with pytest.raises(UserError, match=r"photos/mug/red/1.jpg' lies deeper than .*, or give a root further down"):
        list(open_source(params("folder", tmp_path / "p.zip")).subjects())
    (mug,) = open_source(params("folder", tmp_path / "p.zip" / "photos")).subjects()
    assert [photo.path for photo in mug.photos] == ["mug/red/1.jpg"]


@pytest.mark.parametrize("mask", ["mug/masks/1.png", "masks/mug/1.png", "mug/Masks/1.png"])
def test_masks_in_another_place_are_no_subject(put, params, mask):
    put("mug/blue/1.jpg", mask)
    with pytest.raises(UserError, match="asks' is read as no mask; put masks into <class noun>/<subject>/masks/"):
        list(open_source(params("folder")).subjects())


@pytest.mark.parametrize(
    "mask",
    [
        *("1.mask.png", "1.mask.PNG", "1.MASK.png", "1.jpg.mask.png", "1.mask.jpg"),
        *("1_mask.png", "1-Mask.PNG", "1.jpg_mask.png", "masks/1_mask.png", "masks/1.mask.png", "masks/1.jpg-mask.png"),
        *("masks/1.png", "masks/1.PNG", "masks/1.jpg", "masks/1.jpg.png", "masks/1.JPG.png", "Masks/1.webp"),
    ],
)
def test_masks_are_found_whatever_the_suffix_and_its_case(put, params, mask, caplog):
    put("mug/blue/1.jpg", "mug/blue/2.jpg", f"mug/blue/{mask}")
    (mug,) = open_source(params("folder")).subjects()
    assert [(photo.path, photo.mask_path) for photo in mug.photos] == [
        ("mug/blue/1.jpg", f"mug/blue/{mask}"),
        ("mug/blue/2.jpg", None),
    ]
    assert not caplog.text


def test_a_photo_may_be_of_a_mask(put, params):
    put("mask/venice/death_mask.jpg", "mask/venice/gold-mask.jpg")
    (venice,) = open_source(params("folder")).subjects()
    assert [photo.path for photo in venice.photos] == ["mask/venice/death_mask.jpg", "mask/venice/gold-mask.jpg"]


def test_accents_match_whether_composed_or_not(put, params):
    names = ("caf\u00e9", "cafe\u0301")
    for photo, other in (names, names[::-1]):
        put(f"mug/{photo}/{photo}.jpg", f"mug/{photo}/masks/{other}.png")
    put("captions.csv", content=f"path,caption\nmug/{names[0]}/{names[1]}.jpg,one\nmug/{names[1]}/{names[0]}.jpg,one\n")
    for subject in open_source(params("folder")).subjects():
        assert [(photo.caption, photo.mask_path is not None) for photo in subject.photos] == [("one", True)]


def test_masks_that_match_no_photo_are_reported(put, params, caplog):
    put("mug/blue/1.jpg", "mug/blue/3.mask.png", "mug/blue/masks/2.npy", "mug/blue/masks/1.png")
    list(open_source(params("folder")).subjects())
    assert "2 masks match no photo: " in caplog.text and "mug/blue/masks/2.npy; name a mask after" in caplog.text


def test_photos_of_one_stem_have_masks_of_their_own_or_are_refused(put, params):
    put("mug/blue/x.jpg", "mug/blue/x.png", "mug/blue/masks/x.png")
    with pytest.raises(
        UserError, match=r"one mask, .*/x\.png, for the photos x\.jpg and x\.png; .* such as x\.jpg\.png"
    ):
        list(open_source(params("folder")).subjects())
    put("mug/blue/masks/x.jpg.png")
    (mug,) = open_source(params("folder")).subjects()
    assert [photo.mask_path for photo in mug.photos] == ["mug/blue/masks/x.jpg.png", "mug/blue/masks/x.png"]
    put("mug/blue/x.mask.png")
    with pytest.raises(UserError, match=r"two masks of one name, .* and .*; remove one"):
        list(open_source(params("folder")).subjects())


def test_no_prompts(params):
    assert list(open_source(params("folder")).prompts()) == []
