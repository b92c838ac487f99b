import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from eval.imported.listing import list_images
from runtime.errors import UserError
from tests.eval.imported.conftest import put, table

PICTURE = Image.new("RGB", (20, 20), "red")
NONE: set[str] = set()


def listed(place, names, unusable=NONE):
    return list_images(str(place), "mine", names, unusable)


def refused(place, names, unusable=NONE):
    with pytest.raises(UserError) as caught:
        listed(place, names, unusable)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def keys(listing):
    return sorted((image.subject_id, image.prompt.prompt_id, image.seed) for image in listing.images)


ALL = sorted((f"bench/{s}", prompt, seed) for s in ("duck", "mug") for prompt in range(3) for seed in range(2))


def test_a_folder_lists_its_images(folder, names):
    found = listed(folder, names)
    assert keys(found) == ALL
    assert found.remarks == []
    assert {image.reference for image in found.images} == {""}


def test_subjects_may_have_their_full_ids_prompts_their_numbers_and_files_any_format(tmp_path, names):
    for name in ("0_5.JPG", "1_5.webp", "a_sketch_of_a_duck_5.jpeg", "-1_5.png"):
        put(tmp_path / "x" / "bench" / "duck" / name, PICTURE)
    assert keys(listed(tmp_path / "x", names)) == [("bench/duck", number, 5) for number in (-1, 0, 1, 2)]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_is_read_in_place(folder, names, tmp_path, kind):
    file = tmp_path / f"images.{kind}"
    if kind == "tar":
        with tarfile.open(file, "w") as archive:
            archive.add(folder, "")
    else:
        with zipfile.ZipFile(file, "w") as archive:
            for path in sorted(folder.rglob("*.png")):
                archive.write(path, path.relative_to(folder))
    found = listed(file, names)
    assert keys(found) == ALL
    assert found.root.read(found.images[0].path) == (folder / found.images[0].path).read_bytes()


def test_files_that_are_no_images_are_listed_and_litter_is_not(folder, names):
    for name in ("README.txt", "duck/prompts.json", "duck/.DS_Store", "mug/Thumbs.db", "duck/grid", "@eaDir/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    found = listed(folder, names)
    assert keys(found) == ALL
    assert found.remarks == ["3 files are no images and were ignored: README.txt, duck/grid, duck/prompts.json"]


def test_images_of_a_subject_without_usable_photos_are_listed_as_not_scored(folder, names):
    put(folder / "ring" / "a_ring_in_snow_0.png", PICTURE)
    found = listed(folder, names)
    assert keys(found) == ALL
    assert "1 images of bench/ring are not scored" in found.remarks[0]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("duck/a_duck_on_mars_0.png", r"'duck/a_duck_on_mars_0.png' asks for 'a_duck_on_mars', which is no prompt"),
        ("duck/a_duck_in_snow.png", "'duck/a_duck_in_snow.png' does not end in _<seed>"),
        ("duck/9_0.png", "asks for prompt 9 of bench/duck"),
        ("dukc/0_0.png", "'dukc/0_0.png' is of 'dukc', which is no held-out subject (did you mean 'duck'?)"),
        ("0_0.png", "'0_0.png' is in no subject's folder"),
        ("duck/run1/0_0.png", "'duck/run1/0_0.png' is of 'duck/run1', which is no held-out subject"),
        ("duck/0_00.png", "has the subject, prompt and seed of 'duck/0_00.png'"),
        ("duck/0_0.jpg", "has the subject, prompt and seed of 'duck/0_0.jpg'"),
        ("bench/duck/0_0.png", "has the subject, prompt and seed of 'bench/duck/0_0.png'"),
        ("duck/0_99999999999999999999.png", "has the seed '99999999999999999999', which is no whole number"),
    ],
)
def test_a_name_that_fits_nothing_is_one_sentence_with_what_was_expected(folder, names, name, told):
    put(folder / name, PICTURE)
    message = refused(folder, names)
    assert told in message
    assert "name images <subject>/<prompt>_<seed>.png" in message and "CSV file" in message


def test_of_many_faults_the_first_are_named_and_counted(folder, names):
    for number in range(7):
        put(folder / "duck" / f"x_{number}.png", PICTURE)
    message = refused(folder, names)
    assert "'duck/x_2.png'" in message and "'duck/x_3.png'" not in message
    assert ", and 4 more; name images" in message


def test_places_that_hold_nothing_are_one_sentence(tmp_path, names):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    (tmp_path / "broken.zip").write_bytes(b"x")
    assert "holds no image of a held-out subject" in refused(tmp_path / "empty", names)
    assert "does not exist; correct the path" in refused(tmp_path / "missing", names)
    assert "is no folder, tar, zip or CSV file" in refused(tmp_path / "notes.txt", names)
    assert "is no folder, tar, zip or CSV file" in refused(tmp_path / "x.tar.gz", names)
    assert "broken.zip" in refused(tmp_path / "broken.zip", names)
    assert "missing.csv" in refused(tmp_path / "missing.csv", names)
    assert "does not exist" in refused(tmp_path / "missing" / "x.csv", names)


def test_a_name_that_is_not_utf8_does_not_end_in_a_traceback(folder, names):
    (folder / "duck" / "a_duck_in_snow_0.png").rename(folder / "duck" / os.fsdecode(b"caf\xe9_0.png"))
    assert "caf\ufffd_0.png" in refused(folder, names)


def rows_of_folder(folder: Path):
    return [
        {
            "path": str(path.relative_to(folder.parent)),
            "subject": path.parent.name,
            "prompt": path.stem.rpartition("_")[0],
            "seed": path.stem.rpartition("_")[2],
            "reference": "",
        }
        for path in sorted(folder.rglob("*.png"))
    ]


def test_a_csv_file_lists_images_anywhere(folder, names, tmp_path):
    rows = rows_of_folder(folder)
    rows[0]["path"] = str(tmp_path / rows[0]["path"])
    rows[1]["path"] = f"../{tmp_path.name}/./{rows[1]['path']}"
    rows[2]["path"] = rows[2]["path"].replace("/", "\\")
    found = listed(table(tmp_path / "list.csv", rows), names)
    assert keys(found) == ALL
    for image, row in zip(found.images, rows_of_folder(folder), strict=True):
        assert found.root.read(image.path) == (tmp_path / row["path"]).read_bytes()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path)
    assert keys(listed(tmp_path / "elsewhere" / "link" / "list.csv", names)) == ALL


@pytest.mark.parametrize("written", ["bench/duck/02", "02", "02.png", "photos/duck/02.jpg", " 02 ", "duck\\02.png"])
def test_a_reference_is_the_id_or_the_file_of_a_photo_of_the_subject(folder, names, tmp_path, written):
    rows = rows_of_folder(folder)
    rows[0]["reference"] = written
    found = listed(table(tmp_path / "list.csv", rows), names)
    assert [image.reference for image in found.images[:2]] == ["bench/duck/02", ""]


def test_a_reference_without_a_usable_mask_is_unknown_and_reported(folder, names, tmp_path):
    rows = rows_of_folder(folder)
    rows[0]["reference"], rows[1]["reference"] = "02", "99"
    found = listed(table(tmp_path / "list.csv", rows), names, {"bench/duck/02", "bench/duck/99"})
    assert {image.reference for image in found.images} == {""}
    assert found.remarks == [
        "2 references count as unknown, their photos have no usable mask or were dropped: bench/duck/02, bench/duck/99"
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"path": "mine/duck/none.png"}, "line 2 names the image 'mine/duck/none.png', which is not there"),
        ({"path": ""}, "line 2 names the image '', which is not there"),
        ({"path": "mine"}, "line 2 names the image 'mine', which is not there"),
        ({"subject": "swan"}, "line 2 is of 'swan', which is no held-out subject"),
        ({"prompt": "a swan"}, "line 2 asks for 'a swan', which is no prompt of bench/duck"),
        ({"seed": "one"}, "line 2 has the seed 'one', which is no whole number"),
        ({"reference": "77"}, "line 2 has the reference '77', which is no photo of bench/duck"),
        ({"reference": "bench/mug/00"}, "line 2 has the reference 'bench/mug/00', which is no photo of bench/duck"),
        ({"seed": "1"}, "has the subject, prompt and seed of"),
    ],
)
def test_a_line_that_fits_nothing_is_named(folder, names, tmp_path, change, told):
    rows = rows_of_folder(folder)
    rows[0] |= change
    message = refused(table(tmp_path / "list.csv", rows), names)
    assert told in message
    assert message.endswith("; correct these lines")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no column 'path' (found: nothing)"),
        ("path,subject,prompt\n", "has no column 'seed' (found: path, subject, prompt)"),
        ("path;subject;prompt;seed\n", "has no column 'path' (found: path;subject;prompt;seed)"),
        ("path,subject,prompt,seed\nx.png,duck,0\n", "line 2 has 3 of 4 columns; complete the row"),
        ("path,subject,prompt,seed\nx.png,duck,a duck, in snow,0\n", "line 2 has 5 of 4 columns; quote cells"),
        ('path,subject,prompt,seed\nx.png,duck,"0,0\n', "is not CSV"),
        ("path,subject,prompt,seed\n", "holds no image of a held-out subject"),
    ],
)
def test_a_file_that_is_no_such_table_is_one_sentence(tmp_path, names, text, told):
    file = tmp_path / "list.csv"
    file.write_text(text)
    assert told in refused(file, names)


def test_a_table_in_another_encoding_is_one_sentence(tmp_path, names):
    (tmp_path / "list.csv").write_bytes(b"path,subject,prompt,seed\ncaf\xe9.png,duck,0,0\n")
    assert "is not UTF-8 text" in refused(tmp_path / "list.csv", names)
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbfPath, Subject ,prompt,seed,note\r\n")
    assert "holds no image" in refused(tmp_path / "bom.csv", names)
