"""The oracle of true renders: this subject, as the prompt asks for it, in another pose than the reference's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from eval.generate.methods import METHODS
from eval.generate.truth import Renderer, answer_of, portrait_of, world_ids
from eval.protocol import protocol
from pipelines.photos.roots import Roots, SourceParams
from pipelines.toybox.faces import layouts as face_layouts
from pipelines.toybox.faces import people as persons
from pipelines.toybox.faces.prompts import Wish
from pipelines.toybox.layouts import people
from pipelines.toybox.prompts import asked
from pipelines.toybox.rendering.march import View
from pipelines.toybox.stage import MARKER, ToyboxParams, write_world
from pipelines.toybox.world import Look, apart, render
from runtime.errors import UserError
from tests.world.faces import FACES

SEED, SUBJECTS, PHOTOS = 3, 2, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a world with two evaluation subjects."""
    return write(tmp_path_factory.mktemp("truth") / "toybox", "toys")


def write(folder: Path, world: str) -> Path:
    few = {"mvimgnet_subjects": 1, "mvimgnet_views": 2, "scene_per_view": True, "openimages_photos": 1}
    bench = {"dreambench_subjects": SUBJECTS, "dreambench_photos": PHOTOS}
    of_both = {"root": "-", "seed": SEED, "size": 64, "caption_detail": "noun", "world": world, "faces": FACES}
    write_world(folder, ToyboxParams.model_validate({**of_both, **few, **bench}))
    return folder


def source(folder: Path, **changes: str) -> SourceParams:
    values = {"name": "bench", "layout": "dreambench", "root": str(folder / "dreambench"), "split": "test"}
    return SourceParams.model_validate(values | changes)


def segment(frame_id: str) -> Image.Image:
    image = Image.new("RGB", (8, 8), "white")
    image.info["frame_id"] = frame_id
    return image


def test_an_answer_is_what_the_prompt_says_of_this_subject():
    subject, view, _ = people(SEED, SUBJECTS, PHOTOS)["duck"][0]
    found = answer_of(subject, view, asked("a sketch of a ball shaped duck wearing a hat in the snow"), seed=7)
    assert found[0] is subject
    assert (found[2].scene, found[2].style, found[2].shape, found[2].accessory) == ("snow", "sketch", "ball", "hat")
    plain = [answer_of(subject, view, asked("a photo of a duck"), seed)[2] for seed in range(40)]
    assert {(look.style, look.shape, look.accessory) for look in plain} == {("photo", None, None)}
    assert len({look.scene for look in plain}) > 6, "a prompt without a scene leaves it open"


def test_a_seed_is_a_pose_that_is_not_the_reference_s():
    subject, _, _ = people(SEED, SUBJECTS, PHOTOS)["duck"][0]
    for text, widest in (("a photo of a duck", 180), ("a duck wearing glasses", 50), ("a duck wearing a hat", 180)):
        for azimuth in (-175.0, 0.0, 40.0):
            views = [answer_of(subject, View(azimuth, 20.0), asked(text), seed)[1] for seed in range(60)]
            assert min(apart(view.azimuth, azimuth) for view in views) > 30
            assert max(abs(view.azimuth) for view in views) <= widest
            assert max(apart(view.azimuth, azimuth) for view in views) > 0.8 * min(widest + abs(azimuth), 180)
            assert len({view.azimuth for view in views}) == len(views)


def test_images_are_those_renders_in_any_batch(world: Path):
    prompts = ["a photo of a duck", "a photo of a duck", "a duck on the beach", "a neon picture of a duck"]
    paint, seeds, shown = Renderer([source(world)], 64), [1, 2, 2**32 - 1, 4], segment("bench/duck/01")
    together = [np.asarray(image) for image in paint([shown], ["duck"], prompts, seeds)]
    for image, text, seed in zip(together, prompts, seeds, strict=True):
        (alone,) = paint([shown], ["duck"], [text], [seed])
        assert np.array_equal(image, np.asarray(alone))
    subject, view, _ = people(SEED, SUBJECTS, PHOTOS)["duck"][1]
    item = answer_of(subject, view, asked(prompts[2]), seeds[2])
    assert item[2] == Look("beach", seed=item[2].seed)
    assert np.array_equal(together[2], render([item]).images[0].numpy())
    assert not np.array_equal(together[0], together[1]), "images of one prompt differ"


def test_photos_of_other_sources_are_one_sentence(world: Path, tmp_path: Path):
    assert world_ids([source(world), source(world, name="views", split="train", layout="mvimgnet")]).keys() == {"world"}
    for other in (
        source(tmp_path),
        source(world, root=str(world / "mvimgnet")),
        source(world, root="s3://a/dreambench"),
    ):
        with pytest.raises(UserError, match=r"and source bench \(.*\) is none of its; remove truth from") as error:
            Renderer([source(world, name="first"), other], 64)
        assert "\n" not in str(error.value)


def test_a_world_of_other_code_is_one_sentence(world: Path, tmp_path: Path):
    record = json.loads((world / MARKER).read_text()) | {"fingerprint": "0"}
    (tmp_path / MARKER).write_text(json.dumps(record))
    with pytest.raises(UserError, match="was rendered by other code than this; run the toybox stage again"):
        METHODS["truth"].weights(SimpleNamespace(sources=[source(tmp_path)]))


def test_a_segment_names_its_photo(data: Path, roots: Roots):
    photo = protocol.held_out(data)[0].photos[2]
    assert protocol.read_segment(roots, photo, margin=0.0).info["frame_id"] == photo.frame_id == "bench/duck/02"


def test_an_answer_about_a_person_is_what_the_prompt_says_in_another_pose():
    who, shown = face_layouts.person(SEED, ("held_out", 0)), View(20.0, 5.0)
    for seed in range(30):
        _, view, outfit = portrait_of(who, shown, Wish("beach", "sketch", "glasses", "blue", "sad"), seed)
        assert (outfit.scene, outfit.style, outfit.accessory) == ("beach", "sketch", "glasses")
        assert (outfit.hair_colour, outfit.expression, outfit.job) == ("blue", "sad", None)
        assert -50 <= view.azimuth < -10
    open_ = [portrait_of(who, shown, Wish(job="chef"), seed)[2] for seed in range(30)]
    assert {(outfit.job, outfit.style, outfit.accessory, outfit.hair_colour) for outfit in open_} == {
        ("chef", "photo", None, None)
    }
    assert len({outfit.scene for outfit in open_}) > 6 and len({outfit.expression for outfit in open_}) > 2


def test_people_are_answered_by_their_own_renders(tmp_path: Path):
    paint = Renderer([source(write(tmp_path / "faces", "faces"))], 32)
    (image,) = paint([segment("bench/held_out001/02")], ["man"], ["a man with red hair"], [5])
    photos = face_layouts.evaluated(SEED, face_layouts.members(1, 1, 2), FACES["dreambench_photos"])
    who, view, _ = photos["held_out001"][2]
    expected = portrait_of(who, view, Wish(hair_colour="red"), 5)
    assert np.array_equal(np.asarray(image), persons.render([expected], 32).images[0].numpy())
