import zipfile

import pytest
from pydantic import ValidationError

from pipelines.photos.listings import csv_rows
from pipelines.photos.roots import Root, is_hidden
from pipelines.sources import LAYOUTS, SourceParams, open_source
from pipelines.sources.base import class_noun, named_frames, read_captions
from runtime.errors import UserError


def test_a_repeated_stem_keeps_its_suffix_so_that_ids_stay_unique():
    files = ["1.png", "1.jpg", "0.jpg", ".DS_Store", "Thumbs.db", "1.b.jpg"]
    assert named_frames(files) == {"0": "0.jpg", "1": "1.jpg", "1.b": "1.b.jpg", "1.png": "1.png"}


def test_class_nouns_stand_as_in_captions():
    assert [class_noun(raw) for raw in (" Toy  duck \r\n", "stuffed_animal", "French fries", "Cafe\u0301")] == [
        "toy duck",
        "stuffed animal",
        "french fries",
        "caf\u00e9",
    ]


LITTER = (
    *(".git", "._1.jpg", "Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir", "@Recycle", "#recycle", "#snapshot"),
    *("$RECYCLE.BIN", "RECYCLER", "System Volume Information", "lost+found", "Icon\r"),
)


@pytest.mark.parametrize("name", LITTER)
def test_litter_is_hidden(name):
    assert is_hidden(name)


@pytest.mark.parametrize("name", LITTER)
def test_litter_is_no_class_no_subject_and_no_photo(put, params, name):
    put("mug/blue/1.jpg", f"mug/blue/{name}", f"mug/{name}/2.jpg", f"{name}/x/3.jpg")
    (mug,) = open_source(params("folder")).subjects()
    assert [photo.path for photo in mug.photos] == ["mug/blue/1.jpg"]


def test_litter_archives_and_litter_beside_the_folder_of_an_archive_are_not_seen(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/1.jpg", b"")
        archive.writestr("__MACOSX/._1.jpg", b"")
    (tmp_path / "._a.zip").write_bytes(b"not an archive")
    assert Root(str(tmp_path)).archives() == {"a": "a.zip/a"}


def test_captions_are_optional_and_keyed_by_path(put):
    root = Root(str(put("x.jpg")))
    assert read_captions(root) == {}
    put("captions.csv", content='\ufeffid,caption,path\r\n1,"a mug, red",./a/1.jpg\r\n2,,a/2.jpg\r\n')
    assert read_captions(root) == {"a/1.jpg": "a mug, red"}
    put("captions.csv", content="path,caption\n/a/1.jpg,one\nb//1.jpg,two\n.\\c\\d\\..\\1.jpg,three\n")
    assert read_captions(root) == {"a/1.jpg": "one", "b/1.jpg": "two", "c/1.jpg": "three"}
    put("captions.csv", content='path,caption\na\\1.jpg,"a mug.\nIt is red.",,\na/1.jpg,a mug. It is red.\n')
    assert read_captions(root) == {"a/1.jpg": "a mug. It is red."}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path\na.jpg\n", r"captions\.csv has no column 'caption' \(found: path\)"),
        ("", r"no column 'path' \(found: nothing\)"),
        (
            "path;caption\na.jpg;one\n",
            r"captions\.csv has its columns separated by semicolons; separate them by commas",
        ),
        ("caption\tpath\none\ta.jpg\n", r"captions\.csv has its columns separated by tabs"),
        ("path,caption\na.jpg,one\nb.jpg\n", r"captions\.csv line 3 has 1 of 2 columns"),
        ('path,caption\na.jpg,"' + "x" * 200_000, r"captions\.csv line \d+ is not CSV"),
        ("path,caption\na.jpg,a red mug, on a table\n", r"captions\.csv line 2 has 3 of 2 columns; quote"),
        ('path,caption\na.jpg,one\nb.jpg,"open\nc.jpg,x\nd.jpg,y\n', r"captions\.csv line 3 is not CSV .*; close its"),
        ('path,caption\nb.jpg,"open\nc.jpg,"x" y\n', r"captions\.csv line 2 is not CSV"),
        ('path,caption\nb.jpg,"open\nc.jpg,a mug"\n', r"a quote that is left open takes in the rows before line 3"),
        ("path,caption\na.jpg,one\n./a.jpg,two\n", r"line 3 has another caption for a\.jpg than line 2; remove"),
        (b"path,caption\na.jpg,caf\xe9\n", r"captions\.csv is not UTF-8"),
    ],
)
def test_malformed_captions_are_named(put, content, message):
    root = Root(str(put("captions.csv", content=content)))
    with pytest.raises(UserError, match=message):
        read_captions(root)


def test_csv_rows_give_line_numbers_and_empty_cells_for_absent_optional_columns(put):
    root = Root(str(put("t.csv", content="b,a\n1,2\n\n3,4\n")))
    assert list(csv_rows(root, "t.csv", ("a", "c?"))) == [(2, ["2", ""]), (4, ["4", ""])]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_missing_root_is_named_for_every_layout(tmp_path, params, layout):
    with pytest.raises(UserError, match="does not exist"):
        open_source(params(layout, tmp_path / "nowhere"))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_empty_root_is_an_error_that_says_what_belongs_there(params, layout):
    with pytest.raises(UserError, match=r"; "):
        list(open_source(params(layout)).subjects())


SIGNS = {
    "mvimgnet": "mvimgnet_category.txt",
    "dreambench": "dataset/prompts_and_classes.txt",
    "openimages": "oidv7-class-descriptions-boxable.csv",
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("of", SIGNS)
def test_root_of_another_layout_is_recognised_and_named(put, params, layout, of):
    put(SIGNS[of], "dataset/mug/1.jpg", "7/17/images/0.jpg")
    if layout == of:
        open_source(params(layout))
    else:
        with pytest.raises(UserError, match=f"no root of layout {layout}: it has {SIGNS[of]}; use layout {of}"):
            open_source(params(layout))


@pytest.mark.parametrize(
    ("layout", "path", "expected"),
    [
        ("dreambench", "dataset/x.jpg", "dataset/<subject>/"),
        ("mvimgnet", "7/x.jpg", "<class id>/<video id>/images/"),
        ("mvimgnet", "7/17/x.jpg", "<class id>/<video id>/images/"),
    ],
)
def test_photo_above_the_photo_folders_is_named(put, params, layout, path, expected):
    put("mvimgnet_category.txt", content="7,mug\n") if layout == "mvimgnet" else put(
        SIGNS["dreambench"], content="Classes\nmug,mug\nObject Prompts\n'a {0} {1} here'\n"
    )
    put("dataset/mug/1.jpg", "7/17/images/0.jpg", path)
    with pytest.raises(UserError, match=rf"photo '.*/{path}' is not in a subject folder; move it to {expected}"):
        list(open_source(params(layout)).subjects())


def test_folder_inside_the_dreambench_root_is_recognised(put, params, tmp_path):
    put("dataset/prompts_and_classes.txt", "dataset/mug/1.jpg")
    with pytest.raises(UserError, match="use layout dreambench, whose root is the folder above"):
        open_source(params("folder", tmp_path / "dataset"))


@pytest.mark.parametrize("key", [{"layout": "zip"}, {"split": "val"}, {"name": "a/b"}, {"name": ""}, {"colour": 1}])
def test_source_params_are_strict(key):
    good = {"name": "a", "layout": "folder", "root": "x", "split": "train"}
    SourceParams.model_validate(good)
    with pytest.raises(ValidationError):
        SourceParams.model_validate(good | key)
