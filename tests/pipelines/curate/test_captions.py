"""Every caption has its class noun, and the table says where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.prompt import noun_ends
from pipelines.curate.captions import CaptionParams, caption, place
from pipelines.curate.worker import CurateParams
from runtime.errors import UserError


@pytest.fixture(scope="module")
def params(section) -> CaptionParams:
    return section("curate", CurateParams).captions


@pytest.mark.parametrize(
    ("text", "noun", "expected"),
    [
        ("A red Mug on a table", "mug", "a red mug on a table"),
        ("teddy bear\n in  snow", "teddy bear", "teddy bear in snow"),
        ("a mug.", "mug", "a mug."),
        ("any c++ book", "c++", "any c++ book"),
        ("a cafe\u0301 at night", "caf\u00e9", "a caf\u00e9 at night"),
        ("", "mug", "a photo of a mug"),
        (None, "mug", "a photo of a mug"),
        # the last word of the noun becomes the noun
        ("a brown bear in snow", "teddy bear", "a brown teddy bear in snow"),
        ("bears and a bear", "teddy bear", "bears and a teddy bear"),
        # the template goes before
        ("a catalogue on a table", "cat", "a photo of a cat, a catalogue on a table"),
        ("two mugs", "mug", "a photo of a mug, two mugs"),
        ("a cup", "coffee mug", "a photo of a coffee mug, a cup"),
        ("a c++x book", "c++", "a photo of a c++, a c++x book"),
        ("very " * 40 + "old mug", "mug", "a photo of a mug, " + "very " * 40 + "old mug"),
    ],
)
def test_caption_keeps_its_text_and_gets_its_noun(params, text, noun, expected):
    found = caption(noun, params, text)
    assert found.text == expected
    assert found.text[found.start : found.end] == noun
    assert found.origin == ("shipped" if text else "template")


@given(st.text(max_size=60), st.sampled_from(["mug", "teddy bear", "c++", "french fries", "t-shirt"]))
def test_placeholder_can_be_inserted_right_after_the_noun_of_any_caption(text, noun):
    params = CaptionParams(template="a photo of a {class}", max_words=40, captioner=None)
    found = caption(noun, params, text)
    assert noun_ends(found.text, [noun]) == [found.end]
    assert found.text[found.start : found.end].lower() == noun
    assert len(found.text[: found.end].split()) <= 40


def test_noun_inside_a_word_is_no_noun():
    assert place("a catalogue", "cat") is None
    assert place("a catalogue of a Cat", "cat") == (17, 20)


@pytest.mark.parametrize("template", ["a photo", "{class} and {class}", "a photo of a {class}ish thing"])
def test_template_without_one_place_for_the_noun_is_refused(section, template):
    with pytest.raises(UserError, match=r"captions\.template"):
        section("curate", CurateParams, captions={"template": template, "max_words": 40, "captioner": None})
