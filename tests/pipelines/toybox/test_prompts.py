"""Prompts are written and read by the same phrases."""

from itertools import product

import pytest

from pipelines.toybox.layouts import prompts
from pipelines.toybox.prompts import Answer, asked, prompt
from pipelines.toybox.world import ACCESSORIES, FAMILIES, SCENES, SHAPES, STYLES
from runtime.errors import UserError


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a photo of a gem", Answer()),
        ("a gem", Answer()),
        ("a gem in front of a brick wall", Answer(scene="brick")),
        ("a photo of a gem at night", Answer(scene="night")),
        ("a black and white photo of a gem", Answer(style="monochrome")),
        ("pixel art of a duck", Answer(style="pixel")),
        ("a gem wearing a hat", Answer(accessory="hat")),
        ("a duck wearing glasses", Answer(accessory="glasses")),
        ("a ball shaped gem", Answer(shape="ball")),
        ("a box shaped box", Answer(shape="box")),
        (
            "a sketch of a can shaped mug wearing a crown under water",
            Answer(scene="water", style="sketch", accessory="crown", shape="can"),
        ),
    ],
)
def test_prompts_ask_for_what_they_say(text: str, answer: Answer) -> None:
    assert asked(text) == answer


def test_every_prompt_is_read_as_it_was_written() -> None:
    for live in (True, False):
        for template in prompts(live):
            answer = asked(template.replace("{0} {1}", "gem"))
            assert sum(value is not None for value in vars(answer).values()) == 1, template
            assert prompt(answer, "{0} {1}") == template
    styles = (None, *(style for style in STYLES if style != "photo"))
    some = product((None, *SCENES[:3]), styles, (None, *ACCESSORIES), (None, *SHAPES))
    for number, values in enumerate(some):
        answer = Answer(*values)
        assert asked(prompt(answer, FAMILIES[number % len(FAMILIES)])) == answer


@pytest.mark.parametrize(
    "text",
    [
        "a gem in the shape of a pumpkin",
        "a gem in pixel art style",
        "a gem wearing round sunglasses",
        "a gem on a foggy pier",
        "a star shaped gem",
        "a dog on the beach",
        "a gem next to a mug",
        "",
    ],
)
def test_a_prompt_of_other_words_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match=f"prompt '{text}' is none of the toybox's") as error:
        asked(text)
    assert "\n" not in str(error.value)
