"""The page's handlers: what a button does to the fields, and faults of the input as one sentence in the status line."""

from __future__ import annotations

import html
import re
import zipfile
from types import SimpleNamespace

import pytest

from model.demo.page import ADD, REMOVE, DemoPage, application, said
from runtime.errors import ModelError

gradio = pytest.importorskip("gradio")


def ignore(done, desc):
    """A progress bar that nobody sees."""


@pytest.fixture
def page(place):
    return DemoPage(place.studio, place.folder)


def status(page, answer):
    """Kind and text of the status line."""
    kind, text = re.fullmatch(r'<p class="(\w+)" role="\w+">(.*)</p>', answer[page.status]).groups()
    return kind, html.unescape(text)


def given(page, photos, **changes):
    """All fields as the page has them at first, but for these."""
    values = {page.photos: photos, page.chosen: 0}
    values |= {field: changes.get(name, field.value) for name, field in page.fields.items()}
    return values


def test_examples_are_those_of_the_backbones_that_know_them(page):
    assert page.examples == () and page.takes == []


def test_photos_are_added_searched_and_removed(page, place):
    files = [str(place.folder / name) for name in ("a.png", "b.png")]
    answer = page.add([], files, "mug", ignore)
    assert status(page, answer) == ("note", "Check the outline, then generate.")
    assert [photo.name for photo in answer[page.photos]] == ["a.png", "b.png"] and answer[page.chosen] == 1
    assert [image.size for image in answer[page.strip]] == [(22, 22)] * 2
    later = page.add([], files, " ", ignore)
    assert status(page, later) == ("note", "Write what the subject is, then find it.")
    assert later[page.photos][0].mask is None
    again = page.choose(answer[page.photos], SimpleNamespace(index=0))
    assert again[page.chosen] == 0
    assert page.remove()[page.photos] == []


def test_clicks_change_the_mask_where_they_are(page, place):
    own = page.add([], [str(place.folder / "a.png")], "mug", ignore)[page.photos]
    before, scale = own[0].mask.copy(), own[0].overview().width / own[0].image.width
    page.click(own, 0, REMOVE, 4, SimpleNamespace(index=[15.5 * scale, 15.5 * scale]))
    assert before[15, 15] and not own[0].mask[15, 15]
    page.click(own, 0, ADD, 4, SimpleNamespace(index=[2.5 * scale, 3.5 * scale]))
    assert own[0].mask[3, 2]
    for _ in range(3):
        page.take_back(own, 0)
    assert (own[0].mask == before).all()


def test_generation_shows_each_image_as_it_comes_and_then_the_archive(page, place):
    steps = []
    fields = given(page, place.photos, class_noun="mug", prompt="a mug", steps=3, location_masks=True)
    first, second, last = page.generate(fields, lambda done, desc: steps.append(desc))
    assert [len(answer[page.gallery]) for answer in (first, second)] == [1, 2]
    assert first[page.maps].count("<img") >= 1 and second[page.maps].count('class="maps"') == 2
    assert status(page, first) == ("note", "1 of 2 images.") and status(page, last)[1].startswith("2 images in ")
    assert steps[-1] == "Image 2 of 2, step 3 of 3" and "Loading the models" in steps
    with zipfile.ZipFile(last[page.download].value["path"]) as archive:
        assert "settings.json" in archive.namelist()
    without = given(page, place.photos, class_noun="mug", prompt="a mug", steps=2, images=1, location_masks=False)
    assert "where location masks are on" in next(page.generate(without, ignore))[page.maps]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "Error: the class noun is empty; write what the subject is, such as mug"),
        ({"class_noun": "mug", "prompt": "a cup"}, "Error: caption 'a cup' has no class noun 'mug'"),
        ({"class_noun": "mug", "prompt": "a mug", "seed": None}, "Error: the seed is empty; give a whole number"),
    ],
)
def test_faults_of_the_input_are_one_sentence_on_the_page(page, place, changes, sentence):
    (answer,) = page.generate(given(page, place.photos, **changes), ignore)
    kind, text = status(page, answer)
    assert kind == "error" and text.startswith(sentence) and "\n" not in text


def test_broken_upload_and_missing_photo_are_one_sentence_on_the_page(page, place):
    (place.folder / "broken.jpg").write_bytes(b"no image")
    answer = page.add([], [str(place.folder / "broken.jpg")], "mug", ignore)
    assert answer.keys() == {page.status}
    assert status(page, answer)[1].startswith("Error: broken.jpg: cannot be read as an image")
    assert status(page, page.search([], 0, "mug", ignore))[1].startswith("Error: there is no photo of the subject")


def test_subject_that_is_not_found_opens_its_photo(page, place, monkeypatch):
    def find(photos, noun, report):
        photos[1].mask = photos[1].given & False

    monkeypatch.setattr(page.studio, "find", find)
    place.photos[0].mask = place.photos[0].given
    answer = page.search(place.photos, 0, "mug", ignore)
    assert status(page, answer) == (
        "error", "Error: no mug was found in b.png; click on it in the photo, or correct the class noun"
    )  # fmt: skip
    assert answer[page.chosen] == 1

    def unknown(photos, noun, report):
        raise ModelError("the detector does not know it")

    monkeypatch.setattr(page.studio, "find", unknown)
    assert status(page, page.search(place.photos, 0, "mug", ignore)) == (
        "error",
        "Error: the detector does not know it",
    )


def test_text_of_the_user_is_no_markup():
    assert "<b>" not in said("a <b> in the prompt") and "&lt;b&gt;" in said("a <b>")


def test_every_answer_forbids_requests_to_elsewhere(place):
    from fastapi.testclient import TestClient

    answer = TestClient(application(place.studio, place.folder)).get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'") and "http" not in policy
    assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?:', answer.text)
