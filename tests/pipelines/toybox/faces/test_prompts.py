"""Prompts of the world of faces are written and read by the same phrases."""

import pytest

from pipelines.toybox.faces.prompts import GROUPS, Wish, asked, prompt
from runtime.errors import UserError


@pytest.mark.parametrize(
    ("text", "wish"),
    [
        ("a photo of a man", Wish()),
        ("a woman", Wish()),
        ("a sketch of a woman", Wish(style="sketch")),
        ("a black and white photo of a man", Wish(style="monochrome")),
        ("a man with red hair", Wish(hair_colour="red")),
        ("a woman wearing glasses", Wish(accessory="glasses")),
        ("a man as a chef", Wish(job="chef")),
        ("a man looking sad on the beach", Wish(scene="beach", expression="sad")),
        (
            "pixel art of a woman with blue hair wearing a crown laughing at night",
            Wish("night", "pixel", "crown", "blue", "laughing"),
        ),
    ],
)
def test_prompts_ask_for_what_they_say(text: str, wish: Wish) -> None:
    assert asked(text) == wish


def test_every_prompt_of_a_group_is_read_as_it_was_written() -> None:
    for wishes in GROUPS.values():
        assert len(set(wishes)) == len(wishes)
        for wish in wishes:
            assert sum(value is not None for value in vars(wish).values()) == 1
            assert asked(prompt(wish, "woman")) == wish


@pytest.mark.parametrize(
    "text", ["a man as a nurse", "a mug on the beach", "a man with green hair", "rurer movima", ""]
)
def test_a_prompt_of_other_words_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match=f"prompt '{text}' is none of the world of faces") as error:
        asked(text)
    assert "\n" not in str(error.value)
