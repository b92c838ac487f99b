"""The published folders load with the libraries' own classes."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoImageProcessor, Dinov2Model, GroundingDinoForObjectDetection, GroundingDinoProcessor

from model.backbones.segmenters.sam import build_sam
from train.toybox import check
from train.toybox.lessons.toys import TOYS

WEIGHTS = Path("weights/toybox")


def folder(name: str, file: str) -> Path:
    if not (WEIGHTS / name / file).exists():
        pytest.skip(f"{WEIGHTS / name} is not there; run `python -m train.toybox.all`")
    return WEIGHTS / name


def test_stock_diffusers_paints_with_the_small_stable_diffusion():
    path = folder("diffusion", "model_index.json")
    pipeline = StableDiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    paint = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    image = pipeline("a photo of a red mug on the beach", **paint).images
    assert image.shape == (1, 64, 64, 3)
    assert pipeline.scheduler.config.clip_sample is False
    crossed = [name for name in pipeline.unet.attn_processors if "attn2" in name]
    assert len(crossed) == 7


def test_open_clip_loads_model_and_tokenizer_from_the_folder():
    path = folder("clip", "open_clip_model.safetensors")
    model = open_clip.create_model(f"local-dir:{path}", require_pretrained=True).eval()
    words = open_clip.get_tokenizer(f"local-dir:{path}")(["a photo of a red mug on the beach", "a duck"])
    with torch.no_grad():
        text, image = model.encode_text(words), model.encode_image(torch.zeros(2, 3, 64, 64))
    assert text.shape == image.shape == (2, 128)
    assert not torch.allclose(text[0], text[1])


def test_transformers_loads_the_small_dino():
    path = folder("dino", "model.safetensors")
    model = Dinov2Model.from_pretrained(path, dtype=torch.float32).eval()
    AutoImageProcessor.from_pretrained(path)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).last_hidden_state.shape == (1, 65, 128)


def test_transformers_loads_the_small_grounding_dino():
    path = folder("detector", "model.safetensors")
    model, report = GroundingDinoForObjectDetection.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    processor = GroundingDinoProcessor.from_pretrained(path)
    ids = processor.tokenizer("mug.")["input_ids"]
    assert (ids[0], ids[-2], ids[-1], len(ids)) == (101, 1012, 102, 4)
    with torch.no_grad():
        boxes = model(pixel_values=torch.zeros(1, 3, 64, 64), input_ids=torch.tensor([ids])).pred_boxes
    assert boxes.shape == (1, 12, 4)


def test_segment_anything_loads_the_small_sam():
    path = folder("sam", "model.safetensors")
    sam = build_sam(json.loads((path / "config.json").read_text()))
    sam.load_state_dict({name: value.float() for name, value in load_file(path / "model.safetensors").items()})


def test_weights_are_half_precision_small_and_carry_their_cards():
    folder("sam", "model.safetensors")
    adapters = {file.parent for file in WEIGHTS.rglob("adapter.json")}  # as trained, in float32
    frozen = [file for file in WEIGHTS.rglob("*.safetensors") if file.parent not in adapters]
    for file in frozen:
        assert all(value.dtype == torch.float16 for value in load_file(file).values() if value.is_floating_point()), (
            file
        )
    for card in WEIGHTS.rglob("card.json"):
        text = card.read_text()
        if card.parent in adapters:  # of the train stage, which names the backbones by their place in here
            assert json.loads(text)["recipe"]["train"]["steps"] > 0
            assert '"/' not in text, f"{card} names a path of one machine"
            continue
        assert json.loads(text)["samples"] > 0
        assert "/" not in text, f"{card} names a path"
    assert next(check.size_lines(TOYS)).ok
