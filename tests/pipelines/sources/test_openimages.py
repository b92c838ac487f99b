import io
import tarfile
import zipfile
from collections import Counter

import pytest

from pipelines.photos.decode import decode_mask_image
from pipelines.photos.roots import Root
from pipelines.sources import SourceParams, open_source
from pipelines.sources.openimages_csv import Box, with_masks
from runtime.errors import UserError

BOXES = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
)
MASKS = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks\n"
CLASSES = "LabelName,DisplayName\n/m/1,Cat\n/m/2,French fries\n"


def box(image: str, label: str, corners: str = "0.1,0.5,0.2,0.6", attributes: str = "-1,-1,-1,-1,-1") -> str:
    return f"{image},xclick,{label},1,{corners},{attributes}\n"


@pytest.fixture
def subjects(put, params):
    put("oidv7-class-descriptions-boxable.csv", content=CLASSES)
    return lambda: list(open_source(params("openimages")).subjects())


def test_every_box_is_a_subject_of_one_photo(put, subjects):
    put("train/b.jpg", "train/a.jpg")
    rows = box("b", "/m/1") + box("a", "/m/2") + box("b", "/m/2", "0,1,0,1") + box("b", "/m/1", "0.5,0.9,0.2,0.6")
    put("oidv6-train-annotations-bbox.csv", content=BOXES + rows)
    put("captions.csv", content="path,caption\ntrain/b.jpg,a cat with french fries\n")
    found = subjects()
    assert [(s.subject_id, s.class_name) for s in found] == [
        ("s/train/a/000", "french fries"),
        ("s/train/b/000", "cat"),
        ("s/train/b/001", "french fries"),
        ("s/train/b/002", "cat"),
    ]
    assert [(p.frame_id, p.path, p.box) for s in found[:2] for p in s.photos] == [
        ("s/train/a/000/0", "train/a.jpg", (0.1, 0.2, 0.5, 0.6)),
        ("s/train/b/000/0", "train/b.jpg", (0.1, 0.2, 0.5, 0.6)),
    ]
    assert found[1].photos[0].caption == "a cat with french fries"
    assert not any(s.photos[0].reject for s in found)


def test_every_photo_is_accounted_for(put, subjects):
    put("train/a.jpg", "train/plain.jpg", "train/notes.txt", "train/.DS_Store")
    rows = box("gone", "/m/9") + box("a", "/m/1") + box("gone", "/m/1")
    put("oidv6-train-annotations-bbox.csv", content=BOXES + rows)
    found = subjects()
    assert [(s.subject_id, s.photos[0].frame_id, s.photos[0].path, s.photos[0].reject) for s in found] == [
        ("s/train/a/000", "s/train/a/000/0", "train/a.jpg", None),
        ("s/train/gone", "s/train/gone/0", "train/gone.jpg", "missing_file"),
        ("s/train/notes", "s/train/notes/0", "train/notes.txt", "not_an_image"),
        ("s/train/plain", "s/train/plain/0", "train/plain.jpg", "no_annotation"),
    ]
    assert all(s.class_name == "" for s in found[1:])


@pytest.mark.parametrize(
    ("corners", "attributes", "reject"),
    [
        ("0.1,0.5,0.2,0.6", "1,1,1,1,1", None),
        ("0.5,0.5,0.2,0.6", "0,0,0,0,0", "bad_box"),
        ("0.1,0.5,0.6,0.2", "0,0,1,0,0", "bad_box"),
        ("-0.1,0.5,0.2,0.6", "0,0,0,0,0", "bad_box"),
        ("0.1,1.5,0.2,0.6", "0,0,0,0,0", "bad_box"),
        ("0.1,nan,0.2,0.6", "0,0,0,0,0", "bad_box"),
        ("0.1,,0.2,0.6", "0,0,0,0,0", "bad_box"),
        ("0,1,0,1", "0,0,0,0,0", None),
    ],
)
def test_boxes_without_area_or_outside_the_photo_are_rejects(put, subjects, corners, attributes, reject):
    put("test/a.jpg")
    put("test-annotations-bbox.csv", content=BOXES + box("a", "/m/1", corners, attributes))
    (subject,) = subjects()
    (photo,) = subject.photos
    assert photo.reject == reject
    assert (photo.box is None) == (reject == "bad_box")
    assert ("test-annotations-bbox.csv line 2" in photo.reject_detail) == (reject is not None)


def test_masks_find_their_boxes_whatever_the_order_and_rounding(put, subjects):
    put("train/a.jpg", "train-masks/a_m1_beef.png", "train-masks-3/a_m1_cafe.png", "train-masks/z_m1_x.png")
    rows = box("a", "/m/1", "0.1,0.5,0.2,0.6") + box("a", "/m/1", "0.5,0.9,0.2,0.6") + box("a", "/m/2", "0,1,0,1")
    put("train-annotations-bbox.csv", content=BOXES + rows)
    masks = "a_m1_cafe.png,a,/m/1,cafe,0.50001,0.9,0.2,0.6,,\na_m1_beef.png,a,/m/1,beef,0.1,0.5,0.2,0.6,0.9,\n"
    masks += "a_m1_lost.png,a,/m/1,lost,0.7,0.8,0.7,0.8,,\na_m1_beef.png,a,/m/1,beef,0.1,0.5,0.2,0.6,0.9,\n"
    put("train-annotations-object-segmentation.csv", content=MASKS + masks)
    assert [(s.subject_id, s.class_name, s.photos[0].mask_path, s.photos[0].box) for s in subjects()] == [
        ("s/train/a/002", "french fries", None, (0, 0, 1, 1)),
        ("s/train/a/beef", "cat", "train-masks/a_m1_beef.png", (0.1, 0.2, 0.5, 0.6)),
        ("s/train/a/cafe", "cat", "train-masks-3/a_m1_cafe.png", (0.5, 0.2, 0.9, 0.6)),
        ("s/train/a/lost", "cat", None, (0.7, 0.7, 0.8, 0.8)),
    ]


def test_mask_takes_the_nearest_free_box_of_its_class():
    near, nearer, other = (Box(label, (x, 0, 1, 1), "") for label, x in (("a", 0.1001), ("a", 0.1), ("b", 0.1)))
    masks = [Box("a", (0.1, 0, 1, 1), "", box_id=name, mask=name) for name in ("m", "n")]
    found = with_masks([near, nearer, other], masks)
    assert {name: (b.label, b.corners[0]) for name, b in found.items()} == {
        "002": ("b", 0.1),
        "m": ("a", 0.1),
        "n": ("a", 0.1001),
    }


def test_splits_and_train_archives_are_read_and_splits_without_photos_are_not(put, subjects):
    put("train_0/a.jpg", "train_f/b.jpg", "validation/c.jpg")
    put("oidv6-train-annotations-bbox.csv", content=BOXES + box("b", "/m/1") + box("a", "/m/1"))
    put("validation-annotations-bbox.csv", content=BOXES + box("c", "/m/1"))
    put("test-annotations-bbox.csv", content=BOXES + box("d", "/m/1"))
    assert [(s.subject_id, s.photos[0].path) for s in subjects()] == [
        ("s/train/a/000", "train_0/a.jpg"),
        ("s/train/b/000", "train_f/b.jpg"),
        ("s/validation/c/000", "validation/c.jpg"),
    ]


def test_class_descriptions_without_header(put, tmp_path, subjects):
    (tmp_path / "oidv7-class-descriptions-boxable.csv").unlink()
    put("class-descriptions-boxable.csv", content='/m/1,Cat\n/m/2,"Chest, of drawers"\n')
    put("train/a.jpg")
    put("train-annotations-bbox.csv", content=BOXES + box("a", "/m/1") + box("a", "/m/2"))
    assert [s.class_name for s in subjects()] == ["cat", "chest, of drawers"]


def test_old_box_files_without_attributes_are_read(put, subjects):
    put("train/a.jpg")
    header = "ImageID,LabelName,XMin,XMax,YMin,YMax\n"
    put("train-annotations-bbox.csv", content=header + "a,/m/1,0,1,0,1\n")
    assert subjects()[0].photos[0].reject is None


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-annotations-bbox.csv", "ImageID,LabelName\na,/m/1\n", r"bbox\.csv has no column 'XMin'"),
        ("train-annotations-bbox.csv", BOXES + "a,xclick,/m/1\n", r"bbox\.csv line 2 has 3 of 13 columns"),
        ("train-annotations-bbox.csv", BOXES + box("a", "/m/7"), r"bbox\.csv line 2 has the class '/m/7'"),
        ("train-annotations-object-segmentation.csv", "MaskPath\n", r"segmentation\.csv has no column 'ImageID'"),
        ("oidv7-class-descriptions-boxable.csv", "/m/1\n", r"boxable\.csv line 1 is not 'MID,name'"),
    ],
)
def test_malformed_files_are_named_by_line_and_column(put, subjects, file, content, message):
    put("train/a.jpg")
    put("train-annotations-bbox.csv", content=BOXES + box("a", "/m/1"))
    put(file, content=content)
    with pytest.raises(UserError, match=message):
        subjects()


def test_missing_annotations_are_named(put, tmp_path, subjects):
    put("train/a.jpg")
    with pytest.raises(UserError, match=r"train photos but no boxes; put oidv6-train-annotations-bbox\.csv"):
        subjects()
    (tmp_path / "oidv7-class-descriptions-boxable.csv").unlink()
    with pytest.raises(UserError, match="no class descriptions; put oidv7-class-descriptions-boxable"):
        subjects()


@pytest.mark.parametrize(
    ("cells", "attributes"),
    [
        ("-1,-1,-1,-1,-1", ()),
        ("0,0,0,0,0", ()),
        ("1,0,0,0,0", ("occluded",)),
        ("0,1,0,0,0", ("truncated",)),
        ("0,0,1,0,0", ("group_of",)),
        ("0,0,0,1,0", ("depiction",)),
        ("0,0,0,0,1", ("inside",)),
        ("1,1,-1,0,1", ("occluded", "truncated", "inside")),
    ],
)
def test_attributes_are_those_that_the_annotators_affirmed(put, subjects, cells, attributes):
    put("test/a.jpg")
    put("test-annotations-bbox.csv", content=BOXES + box("a", "/m/1", attributes=cells))
    assert subjects()[0].photos[0].attributes == attributes


def test_boxes_of_a_class_in_a_photo_are_counted(put, subjects):
    put("train/a.jpg", "train/b.jpg")
    rows = box("a", "/m/1") + box("a", "/m/1", "0,1,0,1") + box("a", "/m/2") + box("b", "/m/1")
    put("oidv6-train-annotations-bbox.csv", content=BOXES + rows)
    assert {s.subject_id: s.photos[0].instances for s in subjects()} == {
        "s/train/a/000": 2,
        "s/train/a/001": 2,
        "s/train/a/002": 1,
        "s/train/b/000": 1,
    }


def test_archives_as_published_read_like_folders(put, tmp_path, subjects):
    """The train photos lie in a folder inside their tar, the masks directly in their zip."""
    with tarfile.open(tmp_path / "train_0.tar", "w") as tar:
        member = tarfile.TarInfo("train_0/0a.jpg")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"photo"))
    with zipfile.ZipFile(tmp_path / "train-masks-0.zip", "w") as archive:
        archive.writestr("0a_m1_f.png", b"mask")
    put("train_1/1b.jpg")
    put("oidv6-train-annotations-bbox.csv", content=BOXES + box("0a", "/m/1") + box("1b", "/m/1"))
    put(
        "train-annotations-object-segmentation.csv",
        content=MASKS + "0a_m1_f.png,0a,/m/1,f,0.1,0.5,0.2,0.6,,\n",
    )
    first, second = (subject.photos[0] for subject in subjects())
    assert (first.path, first.mask_path) == ("train_0.tar/train_0/0a.jpg", "train-masks-0.zip/0a_m1_f.png")
    root = Root(str(tmp_path))
    assert (root.read(first.path), root.read(first.mask_path)) == (b"photo", b"mask")
    assert second.path == "train_1/1b.jpg"


def test_real_photographs(real_data):
    root = Root(str(real_data / "openimages"))
    source = open_source(SourceParams(name="oi", layout="openimages", root=root.url, split="train"))
    found = list(source.subjects())
    photos = [subject.photos[0] for subject in found]
    assert Counter(s.subject_id.split("/")[1] for s in found) == {"train": 87, "validation": 75}
    assert Counter(path.split("/")[0] for path in {p.path for p in photos}) == {"train": 58, "validation": 66}
    assert sum(p.mask_path is not None for p in photos) == 87
    assert not any(p.reject for p in photos)
    assert len({p.frame_id for p in photos}) == 162
    assert len({s.class_name for s in found}) == 17
    mask = decode_mask_image(root.read(photos[0].mask_path))
    height, width = mask.shape
    x0, y0, x1, y1 = photos[0].box
    inside = mask[int(y0 * height) : int(y1 * height) + 1, int(x0 * width) : int(x1 * width) + 1]
    assert inside.sum() > 0.95 * mask.sum() > 0


def test_photo_in_a_deeper_folder_is_named(put, subjects):
    put("train/more/b.jpg", "oidv6-train-annotations-bbox.csv")
    with pytest.raises(UserError, match=r"train/more/b.jpg' lies deeper than train/"):
        subjects()


def test_licence_and_author_are_those_of_the_image_file(put, subjects):
    put("train/a.jpg", "train/b.jpg", "train/c.jpg")
    put("oidv6-train-annotations-bbox.csv", content=BOXES + "".join(box(image, "/m/1") for image in "abc"))
    assert [(s.photos[0].licence, s.photos[0].attribution) for s in subjects()] == [(None, None)] * 3
    header = "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title\n"
    put(
        "train-images-boxable-with-rotation.csv",
        content=header
        + 'b,train,https://f.example/b.jpg,https://f.example/b,creativecommons.org/licenses/by/2.0/,,"Li, A.",x\n'
        + "a,train,https://f.example/a.jpg,,,,,x\ngone,train,,,,,,\n",
    )
    assert [(s.photos[0].licence, s.photos[0].attribution) for s in subjects()] == [
        (None, "https://f.example/a.jpg"),
        ("CC-BY-2.0", "Li, A., https://f.example/b"),
        (None, None),
    ]
