"""The oracle `truth`: the right answer to each prompt, rendered, where the photos themselves were rendered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.photos.roots import SourceParams
from pipelines.toybox.faces import people as persons
from pipelines.toybox.faces import prompts as face_prompts
from pipelines.toybox.faces.layouts import SIDE, evaluated
from pipelines.toybox.faces.people import FRAMES, WARDROBE, Person, Portrait, sample_outfit, sample_portrait_view
from pipelines.toybox.faces.prompts import Wish
from pipelines.toybox.layouts import people
from pipelines.toybox.prompts import PLAIN, Answer, asked
from pipelines.toybox.rendering.march import View
from pipelines.toybox.rendering.render import Rendered
from pipelines.toybox.stage import ToyboxParams, fingerprint, world_of
from pipelines.toybox.world import NEAR, Item, Toy, apart, render, sample_look, sample_view, widest
from runtime.errors import UserError


def worlds(sources: Sequence[SourceParams]) -> dict[str, ToyboxParams]:
    """Return the world that each evaluated source's photos are of, by the source's name.

    Raises:
        UserError: the photos of a source are of none, or the present code would render them otherwise.
    """
    found = {}
    for source in sources:
        if source.split == "test":
            world = world_of(Path(source.place)) if source.layout == "dreambench" else None
            if world is None:
                raise UserError(
                    f"method truth renders subjects of the toybox, and source {source.name} ({source.root}) is none of "
                    f"its; remove truth from generate.methods"
                )
            found[source.name] = world
    return found


def world_ids(sources: Sequence[SourceParams]) -> dict[str, str]:
    """Return the ids of what the renders depend on, by role; raises as `worlds` does."""
    named = (f"{name}@{fingerprint(world)[:12]}" for name, world in worlds(sources).items())
    return {"world": ", ".join(named)}


@dataclass(frozen=True)
class WorldAnswers:
    """How prompts are answered in a world.

    photos: of each evaluation subject, in order. answer: the item for a prompt and seed of the subject of a photo.
    render: of items, as images of that many pixels a side.
    """

    photos: Mapping[str, Sequence[Any]]
    answer: Callable[[Any, str, int], Any]
    render: Callable[[Sequence[Any], int], Rendered]


def answers(world: ToyboxParams) -> WorldAnswers:
    """Return how prompts are answered in the world of toys or of faces."""
    if world.world == "faces":
        photos = evaluated(world.seed, world.faces.evaluated(), world.faces.dreambench_photos)
        return WorldAnswers(
            photos,
            lambda shown, text, seed: portrait_of(shown[0], shown[1], face_prompts.asked(text), seed),
            persons.render,
        )
    return WorldAnswers(
        people(world.seed, world.dreambench_subjects, world.dreambench_photos),
        lambda shown, text, seed: answer_of(shown[0], shown[1], asked(text), seed),
        render,
    )


class Renderer:
    """Paints the right answers, `side` px a side (`eval.generate.methods.Painter`); raises as `worlds` does."""

    def __init__(self, sources: Sequence[SourceParams], side: int) -> None:
        self.side = side
        self.answers = {name: answers(world) for name, world in worlds(sources).items()}

    def __call__(
        self, segments: Sequence[Image.Image], class_names: Sequence[str], prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        source, name, number = segments[0].info["frame_id"].split("/")
        world = self.answers[source]
        shown = world.photos[name][int(number)]
        items = [world.answer(shown, text, seed) for text, seed in zip(prompts, seeds, strict=True)]
        return [Image.fromarray(image) for image in world.render(items, self.side).images.numpy()]


def answer_of(subject: Toy, shown: View, answer: Answer, seed: int) -> Item:
    """Return an image of the subject as a prompt asks for it; what the prompt leaves open is drawn from `seed`.

    Its azimuth is more than NEAR degrees from that of the reference, `shown`, and from where an accessory can be seen.
    """
    rng = np.random.default_rng(seed)
    look = replace(
        sample_look(rng, answer.scene), style=answer.style or PLAIN, shape=answer.shape, accessory=answer.accessory
    )
    side, azimuth = widest(look), shown.azimuth
    while apart(azimuth, shown.azimuth) <= NEAR:
        azimuth = float(rng.uniform(-side, side))
    return subject, sample_view(rng, azimuth), look


def portrait_of(who: Person, shown: View, wish: Wish, seed: int) -> Portrait:
    """Return an image of the person as a prompt asks for it; as `answer_of`."""
    rng = np.random.default_rng(seed)
    outfit = replace(
        sample_outfit(rng, wish.scene),
        style=wish.style or PLAIN,
        accessory=wish.accessory,
        hair_colour=wish.hair_colour,
        job=wish.job,
    )
    if wish.expression:
        outfit = replace(outfit, expression=wish.expression)
    on_face = wish.accessory is not None and WARDROBE[wish.accessory].anchor == "face"
    side, azimuth = 50.0 if on_face else SIDE, shown.azimuth
    while apart(azimuth, shown.azimuth) <= NEAR:
        azimuth = float(rng.uniform(-side, side))
    framings = list(FRAMES)
    return who, sample_portrait_view(rng, framings[int(rng.integers(len(framings)))], azimuth), outfit
