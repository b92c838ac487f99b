"""The oracle of true renders: this subject, as the prompt asks for it, in another pose than the reference's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from eval.generate.methods import METHODS
from eval.generate.truth import Renderer, answer_of, world_ids
from eval.protocol import protocol
from pipelines.photos.roots import Roots, SourceParams
from pipelines.toybox.layouts import people
from pipelines.toybox.prompts import asked
from pipelines.toybox.rendering.march import View
from pipelines.toybox.stage import MARKER, ToyboxParams, write_world
from pipelines.toybox.world import Look, apart, render
from runtime.errors import UserError

SEED, SUBJECTS, PHOTOS = 3, 2, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a world with two evaluation subjects."""
    folder = tmp_path_factory.mktemp("truth") / "toybox"
    few = {"mvimgnet_subjects": 1, "mvimgnet_views": 2, "scene_per_view": True, "openimages_photos": 1}
    bench = {"dreambench_subjects": SUBJECTS, "dreambench_photos": PHOTOS}
    write_world(folder, ToyboxParams(root="-", seed=SEED, size=64, caption_detail="noun", **few, **bench))
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
