"""The world of faces in the raw layouts of portraits, FFHQ and DreamBench; see `pipelines.toybox.layouts`.

Its people are of three kinds: the celebrities, whom the base text-to-image model knows by name; unnamed people, whom an
adapter sees in training; and people who are held out of every training. A person has the same id in all layouts.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from pipelines.toybox.faces.people import (
    FRAMES,
    Detail,
    Outfit,
    Person,
    Portrait,
    caption,
    celebrities,
    render,
    sample_outfit,
    sample_person,
    sample_portrait_view,
)
from pipelines.toybox.faces.prompts import GROUPS, prompt
from pipelines.toybox.writing import Progress, generator, rendered, save_listing, save_mask, save_photo, save_table

NAMED, UNNAMED, HELD_OUT = "named", "unnamed", "held_out"
KINDS = (NAMED, UNNAMED, HELD_OUT)
PEOPLE, PORTRAITS, FFHQ, BENCH = 4, 5, 6, 7
"""Random streams of the first kind, other than those of `pipelines.toybox.layouts`; four further on those of the next
kind."""
SIDE = 75.0
"""Largest azimuth, in degrees to either side of the front."""
WORN = 0.2
"""Share of the training photos in which something is worn, as in photos of real people."""
NOT_REAL = ("an invented person, rendered", "2026-01-01")
"""Basis and date in consent.csv."""

Member = tuple[str, int]
"""One of the people: kind, and number among those of the kind."""


@cache
def _named() -> tuple[Person, ...]:
    return tuple(celebrities().values())


def stream(seed: int, layout: int, member: Member) -> np.random.Generator:
    """The random stream of a person, or of the photos of one in a layout."""
    return generator(seed, layout + 4 * KINDS.index(member[0]), member[1])


def person(seed: int, member: Member) -> Person:
    """One of the people of the world of a seed; the celebrities are the same in all."""
    kind, number = member
    if kind == NAMED:
        return _named()[number]
    return sample_person(stream(seed, PEOPLE, member), kept=kind == HELD_OUT)


def id_of(member: Member) -> str:
    """The person's id, such as `named007`: folder in portraits and DreamBench."""
    return f"{member[0]}{member[1]:03d}"


def members(named: int, unnamed: int, held_out: int = 0) -> list[Member]:
    """The first people of each kind."""
    return [(kind, n) for kind, count in zip(KINDS, (named, unnamed, held_out), strict=True) for n in range(count)]


def turn(rng: np.random.Generator, who: Person, count: int, worn: float) -> list[Portrait]:
    """Photos of one person from one side to the other, each with another expression, framing, outfit and scene.

    worn: share of them in which an accessory is worn.
    """
    step, framings = 2 * SIDE / count, list(FRAMES)
    items: list[Portrait] = []
    for k in range(count):
        azimuth = -SIDE + step * (k + 0.5 + float(rng.uniform(-0.35, 0.35)))
        view = sample_portrait_view(rng, framings[int(rng.integers(len(framings)))], azimuth)
        items.append((who, view, sample_outfit(rng, worn=worn)))
    return items


def write_names(file: Path) -> None:
    """The names that the base text-to-image model knows, with nouns and ids: what stage selfaugment reads."""
    rows = [(name, who.noun, id_of((NAMED, n))) for n, (name, who) in enumerate(celebrities().items())]
    save_table(file, "name,noun,person", rows)


def write_portraits(
    root: Path, seed: int, named: int, unnamed: int, views: int, size: int, detail: Detail, progress: Progress
) -> None:
    """`<noun>/<person>/NN.jpg` from one side to the other, their `masks` (the head, without what is worn) and
    consent.csv."""
    people = members(named, unnamed)
    groups = [turn(stream(seed, PORTRAITS, m), person(seed, m), views, WORN) for m in people]
    captions = []
    for i, shown in rendered(groups, render, size, progress):
        folder = f"{groups[i][0][0].noun}/{id_of(people[i])}"
        for k, (photo, (who, _, outfit)) in enumerate(zip(shown, groups[i], strict=True)):
            save_photo(root / folder / f"{k:02d}.jpg", photo.rgb)
            save_mask(root / folder / f"masks/{k:02d}.png", photo.subject)
            captions.append((f"{folder}/{k:02d}.jpg", _caption(who, outfit, k, detail)))
    save_table(root / "captions.csv", "path,caption", sorted(captions))
    save_table(root / "consent.csv", "person,basis,date", [(id_of(m), *NOT_REAL) for m in people])


LABELS = (
    "image_number,age_group,age_group_confidence,gender,gender_confidence,head_pitch,head_roll,head_yaw,"
    "left_eye_occluded,right_eye_occluded,glasses"
)
"""Columns of `ffhq_aging_labels.csv`, of FFHQ-Aging."""


def write_ffhq(root: Path, seed: int, photos: int, size: int, detail: Detail, progress: Progress) -> None:
    """A photo of each of the first unnamed people, the listing, and FFHQ-Aging's labels, which have the nouns."""
    people = members(0, photos)
    groups = []
    for member in people:
        rng = stream(seed, FFHQ, member)
        framing = list(FRAMES)[int(rng.integers(len(FRAMES)))]
        groups.append([(person(seed, member), sample_portrait_view(rng, framing), sample_outfit(rng, worn=WORN))])
    listing, labels, captions = {}, [], []
    for i, [photo] in rendered(groups, render, size, progress):
        [(who, view, outfit)] = groups[i]
        path = f"images1024x1024/{i // 1000 * 1000:05d}/{i:05d}.png"
        save_photo(root / path, photo.rgb)
        listing[str(i)] = {
            "category": "training",
            "metadata": {
                "author": "rendered",
                "photo_title": id_of(people[i]),
                "license": "Public Domain Dedication (CC0)",
                "license_url": "https://creativecommons.org/publicdomain/zero/1.0/",
            },
            "image": {"file_path": path, "pixel_size": [size, size]},
        }
        gender, glasses = {"man": "male", "woman": "female"}[who.noun], outfit.accessory == "glasses"
        pose = (view.elevation, view.roll, view.azimuth)
        labels.append([i, "30-39", 1.0, gender, 1.0, *pose, 0.0, 0.0, "Normal" if glasses else "None"])
        captions.append((path, _caption(who, outfit, i, detail)))
    (root / "ffhq-dataset-v2.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    save_table(root / "ffhq_aging_labels.csv", LABELS, labels)
    save_table(root / "captions.csv", "path,caption", captions)


def evaluated(seed: int, people: Sequence[Member], photos: int) -> dict[str, list[Portrait]]:
    """Id of each person of `write_bench` -> the photos in order: the nearest to the front first, as the reference."""
    turns = {id_of(m): turn(stream(seed, BENCH, m), person(seed, m), photos, worn=0.0) for m in people}
    return {name: sorted(items, key=lambda item: abs(item[1].azimuth)) for name, items in turns.items()}


def prompts() -> list[str]:
    """The evaluation prompts, each with its group; {0} is the unique token, {1} the class noun."""
    return [f"{prompt(wish, '{0} {1}')}  # {group}" for group, wishes in GROUPS.items() for wish in wishes]


def write_bench(
    root: Path, seed: int, people: Sequence[Member], photos: int, size: int, detail: Detail, progress: Progress
) -> None:
    """`dataset/<person>/NN.jpg` without accessories, prompts_and_classes.txt, and groups.csv: kind, noun and skin."""
    shots = evaluated(seed, people, photos)
    names, captions = list(shots), []
    for i, shown in rendered(list(shots.values()), render, size, progress):
        for k, (photo, (who, _, outfit)) in enumerate(zip(shown, shots[names[i]], strict=True)):
            path = f"dataset/{names[i]}/{k:02d}.jpg"
            save_photo(root / path, photo.rgb)
            captions.append((path, _caption(who, outfit, k, detail)))
    of = {id_of(member): (member[0], shots[id_of(member)][0][0]) for member in people}
    save_listing(root, {name: who.noun for name, (_, who) in of.items()}, {"Object Prompts": prompts()})
    groups = [(name, kind, who.noun, who.skin) for name, (kind, who) in sorted(of.items())]
    save_table(root / "groups.csv", "subject,kind,noun,skin", groups)
    save_table(root / "captions.csv", "path,caption", sorted(captions))


def _caption(who: Person, outfit: Outfit, number: int, detail: Detail) -> str:
    """The caption of a photo; a person's photos take turns with the templates. No caption has a name."""
    return caption(who, outfit, variant=number, detail=detail)
