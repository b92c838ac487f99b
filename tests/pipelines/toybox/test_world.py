from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from pipelines.toybox import world
from pipelines.toybox.rendering.accessories import ACCESSORIES, fit
from pipelines.toybox.rendering.sdf import FAMILIES
from pipelines.toybox.world import Look, caption, held_out, sample_look, sample_subject, sample_view


def words(text: str) -> list[str]:
    return text.replace(",", " ,").split()


def test_captions_hold_the_class_noun_and_only_known_words() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        subject = sample_subject(rng)
        look = sample_look(rng, style=0.5, shape=0.5, accessory=0.5, family=subject.family)
        for variant, detail in product(range(len(world.TEMPLATES)), ("full", "colour", "noun")):
            said = words(caption(subject, look, variant, detail))
            assert subject.family in said
            assert set(said) <= set(world.VOCABULARY)
    assert len(world.VOCABULARY) < 200


@pytest.mark.parametrize(
    ("look", "variant", "detail", "said"),
    [
        (Look("beach"), 0, "full", "a photo of a red striped mug on the beach"),
        (Look("beach"), 1, "colour", "a red mug on the beach"),
        (
            Look("beach"),
            2,
            "full",
            "a photo of a red mug with white stripes on the beach",
        ),
        (Look("night"), 3, "noun", "at night, a mug"),
        (
            Look("snow", "sketch", None, "hat"),
            0,
            "full",
            "a sketch of a red striped mug wearing a hat in the snow",
        ),
        (
            Look("city", shape="cone", accessory="glasses"),
            1,
            "noun",
            "a cone shaped mug wearing glasses in the city",
        ),
    ],
)
def test_captions_say_what_is_seen(look: Look, variant: int, detail: world.Detail, said: str) -> None:
    mug = replace(
        sample_subject(np.random.default_rng(0), "mug"),
        colours=("red", "white", "blue"),
        pattern="stripes",
    )
    assert caption(mug, look, variant, detail) == said


def test_captions_without_detail_name_neither_colour_nor_pattern() -> None:
    rng = np.random.default_rng(1)
    hidden = set(world.COLOURS) | {
        "striped",
        "dotted",
        "checked",
        "spiral",
        "two",
        "stripes",
        "dots",
    }
    for _ in range(50):
        assert not hidden & set(words(caption(sample_subject(rng), Look("beach"), int(rng.integers(4)), "noun")))


def test_the_same_stream_gives_the_same_world() -> None:
    def one() -> tuple[object, ...]:
        rng = np.random.default_rng(3)
        return (
            sample_subject(rng),
            sample_view(rng),
            sample_look(rng, style=0.5, shape=0.5, accessory=0.5),
        )

    assert one() == one()


def test_held_out_subjects_are_never_drawn_for_training() -> None:
    rng = np.random.default_rng(4)
    assert not any(held_out(sample_subject(rng, kept=False)) for _ in range(300))
    assert all(held_out(sample_subject(rng, family, kept=True)) for family in world.FAMILIES)
    share = np.mean([held_out(sample_subject(rng)) for _ in range(1500)])
    assert 0.05 < share < 0.25


def test_the_colours_of_a_subject_differ() -> None:
    rng = np.random.default_rng(5)
    for _ in range(100):
        assert len(set(sample_subject(rng).colours)) == 3


def test_a_dressed_subject_shrinks_no_more_than_by_half() -> None:
    rng = np.random.default_rng(6)
    for family, accessory in product(world.FAMILIES, world.ACCESSORIES):
        scale, height = fit(ACCESSORIES[accessory], FAMILIES[family].anchors(sample_subject(rng, family).proportions))
        assert 0.5 < scale <= 1
        assert -0.5 < height <= 0


def test_held_out_subjects_are_one_in_eight_of_every_kind() -> None:
    rng = np.random.default_rng(3)
    kept = [
        (family, colour, pattern)
        for family, colour, pattern in product(world.FAMILIES, world.COLOURS, world.PATTERNS)
        if world.held_out(replace(sample_subject(rng, family), colours=(colour, "white", "black"), pattern=pattern))
    ]
    everything = len(world.FAMILIES) * len(world.COLOURS) * len(world.PATTERNS)
    assert len(kept) == pytest.approx(everything / world.HELD_OUT_SHARE, rel=0.1)
    for place, values in enumerate((world.FAMILIES, world.COLOURS, world.PATTERNS)):
        assert {row[place] for row in kept} == set(values)
