import pytest

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


def test_hidden_and_nested_files_are_ignored_and_foreign_files_are_rejects(put, params):
    put("mug/blue/1.jpg", "mug/blue/.DS_Store", "mug/blue/Thumbs.db", "mug/blue/raw/9.jpg", "mug/blue/notes.txt")
    put(".cache/x/1.jpg", "mug/.x/1.jpg", "mug/readme.md", "readme.md")
    (mug,) = open_source(params("folder")).subjects()
    assert [(p.frame_id, p.reject) for p in mug.photos] == [
        ("s/mug/blue/1", None),
        ("s/mug/blue/notes", "not_an_image"),
    ]
    assert mug.photos[1].reject_detail == "suffix '.txt'"


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


def test_no_prompts(params):
    assert list(open_source(params("folder")).prompts()) == []
