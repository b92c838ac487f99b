"""BLIP as captioner, on a checkpoint of a few thousand weights that the test writes."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

from model.prompt import noun_ends
from pipelines.curate.captioner import Captioner
from pipelines.curate.captions import CaptionerParams
from pipelines.curate.worker import CurateParams, CurateWorker
from pipelines.photos.roots import SourceParams
from pipelines.sources import Photo, Subject
from runtime.errors import ModelError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "mug", "on", "table", "red", "snow", "in"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Published layout: config, image processor, BERT vocabulary, weights."""
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    text = {"vocab_size": len(WORDS), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 16}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8}, projection_dim=8)
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    size = {"height": 16, "width": 16}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(checkpoint) -> CaptionerParams:
    return CaptionerParams(path=str(checkpoint), revision=None, dtype="float32", batch_size=2, max_tokens=4)


def colours(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (20 + n, 30), (60 * n, 250 - 40 * n, 90)) for n in range(count)]


def test_captions_go_on_from_the_prompt_and_are_the_same_each_time(settings):
    captioner = Captioner(settings, "cpu")
    found = captioner.captions(colours(2), "a photo of a mug")
    assert found == Captioner(settings, "cpu").captions(colours(2), "a photo of a mug")
    assert all(text.startswith("a photo of a mug") for text in found)
    assert all(len(text.split()) <= 5 + settings.max_tokens for text in found)


def test_caption_does_not_depend_on_the_other_photos(settings):
    captioner = Captioner(settings, "cpu")
    found = captioner.captions(colours(5), "a photo of a mug")
    assert [captioner.captions([photo], "a photo of a mug")[0] for photo in colours(5)] == found
    assert captioner.captions(colours(4), "a photo of a mug") == found[:4]


def test_worker_captions_photos_without_a_caption_and_records_the_noun(settings, section, tmp_path):
    rng = torch.Generator().manual_seed(1)
    for n in range(4):
        blocks = torch.randint(30, 226, (16, 16, 3), generator=rng, dtype=torch.uint8).repeat_interleave(6, 0)
        Image.fromarray(blocks.repeat_interleave(6, 1).numpy()).save(tmp_path / f"{n}.png")
    photos = tuple(Photo(f"s/x/{n}", f"{n}.png", caption="a red mug" if n == 2 else None) for n in range(4))
    subject = Subject("s/x", "s", "mug", "train", photos)
    captions = {"template": "a photo of a {class}", "max_words": 40, "captioner": settings.model_dump()}
    params = section("curate", CurateParams, captions=captions)
    source = SourceParams(name="s", layout="folder", root=str(tmp_path), split="train")
    frames = CurateWorker(params, [source]).curate(subject)["frames"]
    assert [f["caption_origin"] for f in frames] == ["captioner", "captioner", "shipped", "captioner"]
    for frame in frames:
        assert noun_ends(frame["caption"], ["mug"]) == [frame["noun_end"]]
    assert frames[0]["caption"].startswith("a photo of a mug")


def test_folder_that_is_no_blip_is_named(settings, tmp_path):
    with pytest.raises(ModelError, match="no such file or folder"):
        Captioner(settings.model_copy(update={"path": str(tmp_path / "none")}), "cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}))
    with pytest.raises(ModelError, match="cannot be read as a transformers folder of BLIP"):
        Captioner(settings.model_copy(update={"path": str(tmp_path)}), "cpu")
