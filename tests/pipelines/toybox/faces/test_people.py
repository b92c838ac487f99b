"""People of the world of faces: exact renders, traits that can be seen, captions of a closed vocabulary."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.toybox.faces import head, people
from pipelines.toybox.faces.people import Outfit, Person, Portrait
from pipelines.toybox.rendering.march import View, camera
from pipelines.toybox.rendering.scenes import BLANK
from pipelines.toybox.rendering.sdf import WORN, union

FRONT = View(0.0, 6.0, size=2 * 0.55 / people.HEAD_HEIGHT, position=(0.0, 0.02))
"""The smaller framing: what can be seen here can be seen everywhere."""


def portraits(count: int, seed: int) -> list[Portrait]:
    rng = np.random.default_rng(seed)
    return [
        (
            people.sample_person(rng),
            people.sample_portrait_view(rng, "close" if i % 2 else "bust"),
            people.sample_outfit(rng, style=0.3, worn=0.4, job=0.2, hair=0.2),
        )
        for i in range(count)
    ]


def person(**changes: object) -> Person:
    plain = Person(
        "man",
        (0.5,) * 7,
        "fair",
        "blue",
        "short",
        "brown",
        "none",
        (people.SKINS["fair"], people.HAIR_COLOURS["brown"]),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_a_portrait_does_not_depend_on_its_batch() -> None:
    items = portraits(14, 1)
    whole = people.render(items)
    for i in (0, 5, 13):
        assert torch.equal(whole.images[i], people.render([items[i]]).images[0])
    assert torch.equal(people.render(items[::-1]).images.flip(0), whole.images)


def test_masks_are_exact() -> None:
    item = (person(hair="bald"), View(20.0, 6.0, size=0.9, position=(0.0, 0.02)), Outfit(BLANK))
    size, view = 32, item[1]
    form = people.shot(item).form
    rotation, translation, k = camera(view, size)
    v, u = np.mgrid[:size, :size] + 0.5
    away = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones_like(u)], -1) @ rotation
    away /= np.linalg.norm(away, axis=-1, keepdims=True)
    eye = -rotation.T @ translation
    t = np.linalg.norm(eye) + np.linspace(-1.4, 1.4, 1500)
    p = torch.from_numpy(eye + away[:, :, None] * t[:, None]).float().reshape(-1, 3).T
    q = tuple(torch.full_like(p[0], value) for value in form.numbers)
    truth = (union(form.parts((p[0], p[1], p[2]), q)).reshape(size, size, -1) < 0).any(-1)
    mask = people.render([item], size).masks[0]
    assert (mask != truth).sum() <= 0.02 * truth.sum() + 1


@pytest.mark.parametrize("trait", range(7))
def test_each_trait_moves_the_picture_by_some_pixels(trait: int) -> None:
    traits = [list((0.5,) * 7) for _ in range(2)]
    traits[0][trait], traits[1][trait] = 0.0, 1.0
    items = [(person(traits=tuple(t)), FRONT, Outfit("studio")) for t in traits]
    a, b = people.render(items).images.int()
    assert ((a - b).abs().amax(-1) > 24).sum() >= 6


def test_every_named_value_looks_different() -> None:
    whos = [
        *(person(skin=name, rgb=(rgb, people.HAIR_COLOURS["brown"])) for name, rgb in people.SKINS.items()),
        *(person(iris=name) for name in people.IRISES if name != "blue"),
        *(person(hair=name) for name in head.HAIR_STYLES if name != "short"),
        *(
            person(hair_colour=name, rgb=(people.SKINS["fair"], rgb))
            for name, rgb in people.HAIR_COLOURS.items()
            if name != "brown"
        ),
        *(person(beard=name) for name in head.BEARDS if name != "none"),
        person(noun="woman"),
    ]
    outfits = [
        *(Outfit("studio", expression=name) for name in people.EXPRESSIONS if name != "neutral"),
        *(Outfit("studio", clothes=name) for name in people.CLOTHES if name != "white"),
        *(Outfit("studio", accessory=name) for name in people.WORN_ITEMS),
        *(Outfit("studio", job=name) for name in people.JOBS),
        *(Outfit(name) for name in people.SCENES if name != "studio"),
        *(Outfit("studio", style=name) for name in people.STYLES[1:]),
    ]
    items = [(who, FRONT, Outfit("studio")) for who in whos] + [(person(), FRONT, outfit) for outfit in outfits]
    images = people.render(items).images.int().flatten(1)
    gap = (images[:, None] - images[None]).abs().amax(-1).fill_diagonal_(255)
    assert gap.min() > 24


def test_the_head_fills_its_share_of_the_picture() -> None:
    rng = np.random.default_rng(4)
    for framing, share in people.FRAMES.items():
        views = [people.sample_portrait_view(rng, framing) for _ in range(24)]
        drawn = people.render([(person(hair="bald"), view, Outfit(BLANK)) for view in views])
        skin = (drawn.parts == head.SKIN).any(2).sum(1) / 64
        assert abs(float(skin.float().mean()) - share) < 0.15, framing


def test_the_subject_mask_is_the_head_without_clothes_and_what_is_worn() -> None:
    drawn = people.render([(person(), FRONT, Outfit("studio", accessory=name)) for name in people.WORN_ITEMS])
    assert torch.equal(drawn.subject_masks, (drawn.parts > 0) & (drawn.parts < WORN))
    assert ((drawn.parts == head.GARMENT).sum((1, 2)) > 100).all()


def test_captions_use_a_closed_vocabulary_and_names_stand_for_everything_personal() -> None:
    known = set(people.WORDS)
    for item in portraits(300, 5):
        who, _, outfit = item
        for variant in range(len(people.TEMPLATES)):
            full = people.caption(who, outfit, variant=variant)
            assert set(full.replace(",", " ,").split()) <= known, full
            named = people.caption(who, replace(outfit, hair_colour=None), "rurer movima", variant)
            assert "rurer movima" in named
            assert not {who.noun, "hair", "beard", *head.HAIR_STYLES} & set(named.split()), named
    who = person(hair="long", hair_colour="red", beard="goatee")
    outfit = Outfit("beach", "sketch", "smiling", accessory="glasses")
    assert people.caption(who, outfit) == (
        "a sketch of a man with long red hair and a goatee wearing glasses smiling on the beach"
    )
    assert people.caption(who, outfit, detail="noun") == "a sketch of a man wearing glasses smiling on the beach"
    assert people.caption(who, outfit, "rurer movima", 2) == (
        "on the beach, a sketch of rurer movima wearing glasses smiling"
    )
    bald, dyed = person(hair="bald", hair_colour="red", beard="none"), replace(outfit, hair_colour="blue")
    assert people.caption(bald, dyed) == "a sketch of a man with a bald head wearing glasses smiling on the beach"
    assert people.caption(bald, dyed, detail="noun") == "a sketch of a man wearing glasses smiling on the beach"


def test_names_are_of_two_new_words_each() -> None:
    names = people.names(128)
    words = [word for name in names for word in name.split()]
    assert len(words) == len(set(words)) == 256
    assert not set(words) & set(people.WORDS)
    assert people.names(40) == names[:40]


def test_held_out_people_are_one_in_eight_and_share_no_combination_with_the_others() -> None:
    rng = np.random.default_rng(6)
    kept = {
        flag: {(p.skin, p.hair, p.hair_colour, p.iris) for p in (people.sample_person(rng, flag) for _ in range(400))}
        for flag in (True, False)
    }
    assert not kept[True] & kept[False]
    anyone = [people.held_out(people.sample_person(rng)) for _ in range(4000)]
    assert abs(np.mean(anyone) - 1 / 8) < 0.03
    assert not any(people.held_out(who) for who in people.celebrities().values())
