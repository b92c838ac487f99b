"""Readers of faces: FFHQ, CelebAMask-HQ, and portraits with consent."""

import json

import pytest

from pipelines.sources import SourceParams, open_source
from runtime.errors import UserError


@pytest.fixture
def ffhq(put):
    """Three listed photos, one of validation, one missing."""
    rows = {str(n): {"category": "validation" if n == 1 else "training", "metadata": {}} for n in (0, 1, 1002)}
    put("ffhq-dataset-v2.json", content=json.dumps(rows))
    return put("images1024x1024/00000/00000.png", "images1024x1024/00000/00001.png", "images1024x1024/LICENSE.txt")


def test_ffhq_is_a_person_a_photo_of_the_category_that_fits_the_split(ffhq, params):
    first, second = open_source(params("ffhq")).subjects()
    assert (first.subject_id, first.class_name) == ("s/00000", "person")
    assert [(p.frame_id, p.path, p.reject) for p in first.photos] == [
        ("s/00000/0", "images1024x1024/00000/00000.png", None)
    ]
    (photo,) = second.photos
    assert (photo.frame_id, photo.path) == ("s/01002/0", "images1024x1024/01000/01002.png")
    assert (photo.reject, photo.reject_detail) == ("missing_file", "named in ffhq-dataset-v2.json")
    test = SourceParams(name="s", layout="ffhq", root=str(ffhq), split="test")
    assert [subject.subject_id for subject in open_source(test).subjects()] == ["s/00001"]


def test_ffhq_has_each_photo_s_licence_and_author(put, params):
    photo = {
        "photo_url": "https://www.flickr.com/photos/ann/1/",
        "author": "Ann",
        "license": "Attribution-NonCommercial License",
        "license_url": "https://creativecommons.org/licenses/by-nc/2.0/",
    }
    named = {"author": "Bo", "license": "Public Domain Mark"}
    rows = {"0": photo, "1": named, "2": {}}
    put(
        "ffhq-dataset-v2.json",
        content=json.dumps({n: {"category": "training", "metadata": row} for n, row in rows.items()}),
    )
    put(*(f"images1024x1024/0000{n}.png" for n in rows))
    entry = params("ffhq").model_copy(update={"licence": "MIT", "attribution": "Cy"})
    assert [(s.photos[0].licence, s.photos[0].attribution) for s in open_source(entry).subjects()] == [
        ("CC-BY-NC-2.0", "Ann, https://www.flickr.com/photos/ann/1/"),
        ("CC-PDM-1.0", "Bo"),
        ("MIT", "Cy"),
    ]


HEADER = "image_number,age_group,age_group_confidence,gender,gender_confidence"


def test_ffhq_with_labels_has_men_and_women_of_the_adults(ffhq, params, put):
    put(
        "ffhq_aging_labels.csv",
        content=f"{HEADER}\n0,30-39,1.0,female,0.9\n1,20-29,1.0,male,1.0\n1002,10-14,1,male,1\n",
    )
    assert [s.class_name for s in open_source(params("ffhq")).subjects()] == ["woman", "person"]


@pytest.mark.parametrize("row", ["x,30-39,1,male,1", "0,30-39,1,,1"])
def test_ffhq_with_broken_labels_is_refused(ffhq, params, put, row):
    put("ffhq_aging_labels.csv", content=f"{HEADER}\n{row}\n")
    with pytest.raises(UserError, match=r"ffhq_aging_labels\.csv line 2 has number .*; replace it with the published"):
        list(open_source(params("ffhq")).subjects())


def test_ffhq_in_one_folder(put, params):
    put("ffhq-dataset-v2.json", content=json.dumps({"7": {"category": "training"}}))
    put("thumbnails128x128/00007.png")
    (subject,) = open_source(params("ffhq")).subjects()
    assert subject.photos[0].path == "thumbnails128x128/00007.png"


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ("[]", "is not FFHQ's listing"),
        ("{", "is not FFHQ's listing"),
        ('{"a": {"category": "training"}}', "is not FFHQ's listing"),
        ('{"0": {"category": "more"}}', "has category 'more' for photo 00000"),
        ('{"5": {"category": "training"}}', "00000.png' is not in ffhq-dataset-v2.json; remove it"),
    ],
)
def test_ffhq_with_another_listing_is_refused(ffhq, params, put, listing, message):
    put("ffhq-dataset-v2.json", content=listing)
    with pytest.raises(UserError, match=message):
        list(open_source(params("ffhq")).subjects())


def test_ffhq_without_listing_or_photos_is_refused(put, params):
    put("images1024x1024/00000/00000.png")
    with pytest.raises(UserError, match=r"ffhq-dataset-v2\.json is missing"):
        list(open_source(params("ffhq")).subjects())
    put("ffhq-dataset-v2.json")
    (put() / "images1024x1024").rename(put() / "photos")
    with pytest.raises(UserError, match="has no folder images1024x1024"):
        list(open_source(params("ffhq")).subjects())


MAPPING = "idx  orig_idx  orig_file\n0 119613 119614.jpg\n1 99094 099095.jpg\n2 200121 200122.jpg\n"
IDENTITIES = "119614.jpg 31\n099095.jpg 7\n200122.jpg 31\n"


def test_celebahq_without_identities_is_a_subject_a_photo(put, params):
    put("CelebA-HQ-img/0.jpg", "CelebA-HQ-img/1.jpg", "CelebA-HQ-img/notes.txt")
    found = list(open_source(params("celebahq")).subjects())
    assert [(s.subject_id, s.class_name) for s in found] == [
        ("s/0", "person"),
        ("s/1", "person"),
        ("s/notes", "person"),
    ]
    assert [p.frame_id for s in found for p in s.photos] == ["s/0/0", "s/1/1", "s/notes/notes"]
    assert found[2].photos[0].reject == "not_an_image"


def test_celebahq_with_identities_joins_the_photos_of_a_person(put, params):
    put("CelebA-HQ-img/0.jpg", "CelebA-HQ-img/1.jpg", "CelebA-HQ-img/2.jpg")
    put("CelebA-HQ-to-CelebA-mapping.txt", content=MAPPING)
    put("identity_CelebA.txt", content=IDENTITIES)
    put("list_attr_celeba.txt", content="3\nBald Male\n119614.jpg -1 1\n099095.jpg -1 -1\n200122.jpg 1 1\n")
    found = list(open_source(params("celebahq")).subjects())
    assert [(s.subject_id, s.class_name, [p.frame_id for p in s.photos]) for s in found] == [
        ("s/p31", "man", ["s/p31/0", "s/p31/2"]),
        ("s/p7", "woman", ["s/p7/1"]),
    ]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("CelebA-HQ-to-CelebA-mapping.txt", None, "mapping.txt is missing; identity_CelebA.txt cannot be read"),
        ("CelebA-HQ-to-CelebA-mapping.txt", "idx\n0 1\n", "mapping.txt line 2 is not 'idx orig_idx orig_file'"),
        ("CelebA-HQ-to-CelebA-mapping.txt", "idx orig_idx orig_file\n", "mapping.txt has no row for photo 0"),
        ("identity_CelebA.txt", "119614.jpg\n", "line 1 is not '<file> <identity>'"),
        ("identity_CelebA.txt", "1.jpg 3\n", "identity_CelebA.txt has no row for 119614.jpg"),
        ("list_attr_celeba.txt", "1\nBald Young\n", "line 2 has no column Male"),
    ],
)
def test_celebahq_with_broken_listings_is_refused(put, params, file, content, message):
    root = put("CelebA-HQ-img/0.jpg")
    put("CelebA-HQ-to-CelebA-mapping.txt", content=MAPPING)
    put("identity_CelebA.txt", content=IDENTITIES)
    put(file, content=content or "")
    if content is None:
        (root / file).unlink()
    with pytest.raises(UserError, match=message):
        list(open_source(params("celebahq")).subjects())


def test_portraits_are_folders_with_a_row_of_consent_each(put, params):
    put("woman/ada/1.jpg", "woman/ada/2.jpg", "man/ben/1.jpg")
    put("consent.csv", content="person,basis,date\nada,signed form,2026-01-31\nben,myself,2026-02-01\n")
    assert [(s.subject_id, s.class_name, len(s.photos)) for s in open_source(params("portraits")).subjects()] == [
        ("s/man/ben", "man", 1),
        ("s/woman/ada", "woman", 2),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "consent.csv is missing; list every person there"),
        ("ben,myself,2026-02-01", "consent.csv has no row for 'ada'; add one, or remove the folder ada"),
        ("ada,,2026-02-01", "line 2 has no basis"),
        (",form,2026-02-01", "line 2 has no person"),
        ("ada,form,1.2.2026", "line 2 has the date '1.2.2026'; write it as 2026-01-31"),
        ("ada,form", "line 2 has 2 of 3 columns"),
    ],
)
def test_portraits_without_consent_are_refused(put, params, rows, message):
    put("woman/ada/1.jpg")
    if rows:
        put("consent.csv", content=f"person,basis,date\n{rows}\n")
    with pytest.raises(UserError, match=message):
        list(open_source(params("portraits")).subjects())


@pytest.mark.parametrize("noun", ["girl", "Boy", "child"])
def test_portraits_of_minors_are_refused(put, params, noun):
    put(f"{noun}/ada/1.jpg")
    put("consent.csv", content="person,basis,date\nada,form,2026-02-01\n")
    with pytest.raises(UserError, match=f"has the class noun {noun.lower()}; layout portraits takes no minors"):
        list(open_source(params("portraits")).subjects())


def test_the_folder_layout_does_not_read_portraits(put, params):
    put("woman/ada/1.jpg")
    put("consent.csv", content="person,basis,date\nada,form,2026-02-01\n")
    with pytest.raises(UserError, match=r"it has consent\.csv; use layout portraits"):
        open_source(params("folder"))
