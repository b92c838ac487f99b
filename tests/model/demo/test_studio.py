"""What the page's handlers do: images with their settings and maps, and one sentence for what a user can correct."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from model import sampler
from model.backbones.variant import load_variant
from model.demo.studio import DrawingSettings, Studio, archive
from runtime.errors import ModelError
from tests.world.models import make_adapter

WANTED = {
    "method": "customcontrast", "class_noun": "mug", "prompt": "a mug on ice", "negative_prompt": "", "strength": 1.0,
    "seed": 5, "images": 2, "steps": 4, "guidance_scale": 5.0, "location_masks": True,
}  # fmt: skip


def drawn(place, photos=None, report=lambda done, text: None, **changes):
    wanted = DrawingSettings(**WANTED | changes)
    return list(place.studio.draw(place.photos if photos is None else photos, wanted, place.folder, report))


def test_images_carry_their_settings_and_maps_and_the_model_is_loaded_once(place):
    assert place.loads == []
    told = []
    first, second = drawn(place, report=lambda done, text: told.append((done, text)))
    assert len(place.loads) == 1 and place.clip.seen[0][0][0].size == (22, 22)
    assert [len(images) for images, _ in place.clip.seen] == [2, 2]
    assert (first.settings["seed"], second.settings["seed"]) == (5, 6)
    stored = Image.open(second.file)
    assert json.loads(stored.text["customcontrast"]) == second.settings
    assert second.settings["base_model"] == "tiny@0" and second.settings["location_masks"] is True
    assert np.array_equal(np.asarray(stored), np.asarray(second.image))
    assert first.maps and all(values.min() >= 0 and values.max() <= 1 for _, _, values in first.maps)
    assert [name for name, _ in first.overlays()] == [
        f"step {step + 1}, t\N{NO-BREAK SPACE}{t}" for step, t, _ in first.maps
    ]
    assert told[-1] == (1.0, "Image 2 of 2, step 4 of 4")
    (again,) = drawn(place, seed=6, images=1)
    assert again.image.tobytes() == second.image.tobytes() and len(place.loads) == 1


def test_without_location_masks_there_are_no_maps(place):
    (only,) = drawn(place, location_masks=False, images=1)
    assert only.maps == [] and only.settings["location_masks"] is False


def test_method_with_target_phrases_takes_the_noun_and_several_photos(place, tiny_sd):
    make_adapter(tiny_sd, encoder="realcustom", textual=False, tv_fusion=False).save(place.folder / "realcustom")
    place.studio = Studio({"realcustom": place.folder / "realcustom"}, "tiny", "cpu", "float32")
    (only,) = drawn(place, method="realcustom", images=1)
    assert only.settings["words"] == ["mug"] and only.maps


def test_archive_holds_images_settings_and_references(place):
    made = drawn(place)
    with zipfile.ZipFile(archive(made, place.photos)) as opened:
        assert opened.namelist() == ["5.png", "6.png", "references/0.png", "references/1.png", "settings.json"]
        rows = json.loads(opened.read("settings.json"))
        with opened.open("references/1.png") as stream:
            assert Image.open(stream).mode == "RGBA"
    assert rows == [{"file": item.file.name, **item.settings} for item in made]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"photos": []}, "there is no photo of the subject; add one, or take an example"),
        ({"class_noun": " "}, "the class noun is empty; write what the subject is, such as mug"),
        ({"prompt": ""}, "the prompt is empty; write one with the class noun, such as 'a photo of a mug'"),
        ({"prompt": "a cup"}, "caption 'a cup' has no class noun 'mug'"),
        ({"seed": None}, "the seed is empty; give a whole number"),
        ({"prompt": "a mug" + " on ice" * 60}, r"the prompt needs \d+ tokens, but the text encoder reads \d+; shorten"),
        ({"negative_prompt": "ice " * 90}, "the negative prompt needs"),
    ],
)
def test_what_the_user_can_correct_is_one_sentence(place, changes, sentence):
    with pytest.raises(ModelError, match=sentence) as caught:
        drawn(place, **changes)
    assert "\n" not in str(caught.value)


def test_empty_mask_is_one_sentence_before_a_model_is_loaded(place):
    place.photos[1].given = np.zeros_like(place.photos[1].given)
    with pytest.raises(ModelError, match=r"b.png: the mask is empty; click on the subject in the photo"):
        drawn(place)
    assert place.loads == []


def test_adapter_of_other_backbones_is_one_sentence(place, monkeypatch):
    monkeypatch.setattr(sampler, "load_variant", load_variant)
    with pytest.raises(ModelError, match=r"adapter: the adapter was trained on 'tiny', but variant 'sd15' has"):
        Studio({"customcontrast": place.folder / "adapter"}, "sd15", "cpu", "float32")
