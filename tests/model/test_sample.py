"""The command line of one picture, its backbones replaced by tiny ones."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from model import sample, sampler
from model.backbones.features.face import load_faces
from model.backbones.segmenters.detection import Cut, Detection
from model.backbones.variant import load_variant, variant_of
from runtime.cli import Parser, main
from runtime.errors import ModelError
from tests.world.faces import face_spec, word_adapter, write_recogniser
from tests.world.hub import serving
from tests.world.models import FakeClip, make_adapter
from tests.world.subject import photo


class FakeGroundedSam:
    """Finds what it is told to find."""

    def __init__(self, mask: np.ndarray | None) -> None:
        self.mask, self.phrases = mask, []

    def cut_one(self, image, phrase):
        self.phrases.append(phrase)
        return (None, None) if self.mask is None else (Detection((0, 0, 9, 9), 0.9), Cut(self.mask, 0.9))


@pytest.fixture
def workplace(tmp_path, tiny_sd, monkeypatch):
    """A folder with photo.png, mask.png, cut.png (transparent) and adapter/; the encoder and the finder in use."""
    image, mask = photo()
    image.save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    cut = image.convert("RGBA")
    cut.putalpha(Image.fromarray(mask))
    cut.save(tmp_path / "cut.png")
    make_adapter(tiny_sd).save(tmp_path / "adapter", data_hash="d1")
    clip, finder = FakeClip(), FakeGroundedSam(mask)
    variant = load_variant("toybox").model_copy(update={"resolution": 16})
    monkeypatch.setattr(sampler, "load_variant", lambda name: variant)
    monkeypatch.setattr(sampler, "load_diffusion", lambda spec, dtype, device: tiny_sd)
    monkeypatch.setattr(sampler, "adapter_source", lambda *_: SimpleNamespace(load=lambda device: clip))
    monkeypatch.setattr(sample, "load_grounded_sam", lambda *specs, **settings: finder)
    return SimpleNamespace(folder=tmp_path, clip=clip, finder=finder)


def command(folder, *words: str, prompt: str = "a mug on ice", reference: str = "photo.png") -> list[str]:
    fixed = ["--adapter", str(folder / "adapter"), "--reference", str(folder / reference), "--class-noun", "mug"]
    fixed += ["--prompt", prompt, "--out", str(folder / "out" / "a.png"), "--steps", "2", "--variant", "toybox"]
    return [*fixed, "--device", "cpu", *words]


def options(*words: str):
    parser = Parser()
    sample.arguments(parser)
    return parser.parse_args(words)


def call(workplace, *words: str, **settings: str) -> Image.Image:
    sample.main(options(*command(workplace.folder, *words, **settings)))
    return Image.open(workplace.folder / "out" / "a.png")


def test_picture_carries_its_settings_and_the_same_seed_draws_it_again(workplace):
    picture = call(workplace, "--mask", str(workplace.folder / "mask.png"), "--seed", "5")
    settings = json.loads(picture.text["customcontrast"])
    assert settings["prompt"] == "a mug on ice" and settings["seed"] == 5 and settings["references"] == ["photo.png"]
    assert settings["base_model"] == "tiny@0" and settings["data_hash"] == "d1"
    assert re.fullmatch("adapter@[0-9a-f]{12}", settings["adapter"])
    assert picture.size == (16, 16) and settings["location_masks"] is True
    assert picture.text["generated"] == "yes"
    assert (picture.text["model"], picture.text["adapter"]) == (settings["base_model"], settings["adapter"])
    assert "digitalsourcetype/trainedAlgorithmicMedia" in picture.text["XML:com.adobe.xmp"]
    without = call(workplace, "--mask", str(workplace.folder / "mask.png"), "--seed", "5", "--no-location-masks")
    assert json.loads(without.text["customcontrast"])["location_masks"] is False
    again = call(workplace, "--mask", str(workplace.folder / "mask.png"), "--seed", "5")
    assert picture.tobytes() == again.tobytes()
    assert call(workplace, "--mask", str(workplace.folder / "mask.png"), "--seed", "6").tobytes() != again.tobytes()


def test_adapter_of_the_hub_is_recorded_with_its_commit(workplace, tiny_sd, monkeypatch):
    mask = ["--mask", str(workplace.folder / "mask.png"), "--seed", "5"]
    local = call(workplace, *mask)
    with serving(monkeypatch, str(workplace.folder)) as hub:
        where = make_adapter(tiny_sd).push_to_hub("ann/mugs", token=hub.owner)
        fetched = call(workplace, *mask, "--adapter", where)
        with pytest.raises(ModelError, match=r"^ann/mugs: has no revision 'v2'; give a commit, tag or branch"):
            call(workplace, "--adapter", "ann/mugs@v2")
        make_adapter(replace(tiny_sd, name="other")).push_to_hub("ann/other", token=hub.owner)
        with pytest.raises(ModelError, match=r"^ann/other@[0-9a-f]{40}: the adapter was trained on base model 'other'"):
            call(workplace, *mask, "--adapter", "ann/other")
    assert json.loads(fetched.text["customcontrast"])["adapter"] == where
    assert fetched.tobytes() == local.tobytes()


def test_target_phrase_is_given_and_recorded(workplace, tiny_sd):
    make_adapter(tiny_sd, encoder="realcustom", textual=False, tv_fusion=False).save(workplace.folder / "adapter")
    mask = ["--mask", str(workplace.folder / "mask.png"), "--method", "realcustom"]
    noun = call(workplace, *mask, prompt="a mug on ice")
    assert json.loads(noun.text["customcontrast"])["words"] == ["mug"]
    other = call(workplace, *mask, "--word", "ice", prompt="a mug on ice")
    assert json.loads(other.text["customcontrast"])["words"] == ["ice"] and other.tobytes() != noun.tobytes()


def test_face_is_read_by_its_recogniser_and_named_in_the_settings(workplace, tiny_sd, monkeypatch, tmp_path):
    faces = load_faces(face_spec(write_recogniser(tmp_path / "vit")), "cpu", pixels=True)
    asked = []
    source = SimpleNamespace(load=lambda device: faces)
    monkeypatch.setattr(sampler, "adapter_source", lambda variant, *reads: asked.append(reads) or source)
    word_adapter(tiny_sd, tmp_path / "vit", image_encoder=faces.name).save(workplace.folder / "adapter")
    words = ["--mask", str(workplace.folder / "mask.png"), "--method", "dreamidentity"]
    image = call(workplace, *words, prompt="a mug on ice")
    assert asked == [("dreamidentity", (0, 1, 2))]
    assert json.loads(image.text["customcontrast"])["image_encoder"] == faces.name
    assert image.tobytes() != call(workplace, *words, "--strength", "0", prompt="a mug on ice").tobytes()


@pytest.mark.parametrize("method", ["realcustom", "realcustom_pp"])
def test_adapter_of_a_method_that_is_not_there_is_one_sentence(method, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--reference", "a.png", "--class-noun", "mug", "--prompt", "a mug", "--out", "b.png", "--method", method]
    with pytest.raises(SystemExit):
        main(["sample", *words])
    said = f"error: weights/toybox/{method} holds no adapter of {method}; train one"
    assert capsys.readouterr().err.startswith(said)


def test_mask_transparency_and_grounded_sam_give_the_same_segment(workplace):
    call(workplace, "--mask", str(workplace.folder / "mask.png"))
    call(workplace, reference="cut.png")
    assert workplace.finder.phrases == []
    call(workplace)
    assert workplace.finder.phrases == ["mug"]
    first, second, third = (np.asarray(images[0]) for images, _ in workplace.clip.seen)
    assert np.array_equal(first, second) and np.array_equal(first, third)


def test_variant_is_found_by_the_adapter_s_base_model():
    found = variant_of(load_variant("sdxl").diffusion.path)
    assert found is not None and found.name == "sdxl"
    assert variant_of("nobody/nothing") is None


def test_each_prompt_with_each_seed_is_the_picture_it_is_alone(workplace, capsys):
    words = ["--prompt", "a red mug", "--seed", "3", "5", "--out", str(workplace.folder / "many")]
    mask = ["--mask", str(workplace.folder / "mask.png")]
    sample.main(options(*command(workplace.folder, *mask, *words)))
    made = sorted(path.name for path in (workplace.folder / "many").iterdir())
    assert made == ["0-3.png", "0-5.png", "1-3.png", "1-5.png"]
    assert [line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()] == made
    alone = call(workplace, *mask, "--seed", "5", prompt="a red mug")
    among = Image.open(workplace.folder / "many" / "1-5.png")
    assert alone.tobytes() == among.tobytes() and alone.text == among.text


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["--class-noun", "dog"], {"prompt": "mug, dog"}, "1 --reference and 2 --class-noun; give one"),
        (["--out", "a.jpg"], {}, "a.jpg: the settings are stored in PNG"),
        (["--seed", "1", "2"], {}, "a.png: 2 images need a folder; give its name"),
        (["--prompt", "nothing", "--out", "many"], {}, "caption 'nothing' has no class noun 'mug'"),
        (["--adapter", "nowhere"], {}, "pass the folder of a trained adapter"),
        (["--method", "realcustom"], {}, "the adapter's method is mfi, not realcustom; leave --method out"),
        (["--word", "ice"], {}, "the adapter's method 'mfi' takes no target phrase; leave --word out"),
        (["--mask", "nowhere.png"], {}, "nowhere.png: cannot be read as an image"),
        ([], {"prompt": "a dog"}, "caption 'a dog' has no class noun 'mug'"),
        ([], {"reference": "adapter/adapter.json"}, "adapter.json: cannot be read as an image"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_1(workplace, words, settings, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sample", *command(workplace.folder, *words, **settings)])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_photo_without_the_subject_is_one_sentence(workplace):
    workplace.finder.mask = None
    with pytest.raises(sample.ModelError, match="no 'mug' was found in the photo; give a mask"):
        call(workplace)
