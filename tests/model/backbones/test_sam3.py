"""SAM 3 in the place of detector and segmenter: boxes, scores and masks are those of transformers' processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Sam3Config, Sam3ImageProcessor, Sam3Model, Sam3Processor

from model.backbones.grounded_sam import GroundedSam, PhraseSam, load_grounded_sam
from model.backbones.variant import DetectorSpec, SamSpec
from model.images.references import find_subject
from runtime.errors import ModelError
from tests.model.backbones.conftest import write_clip_tokenizer

WIDTH = {"hidden_size": 32, "num_attention_heads": 2}
LAYER = WIDTH | {"num_layers": 1, "intermediate_size": 32}
SIZES = {
    "vision_config": {
        "backbone_config": WIDTH
        | {
            "model_type": "sam3_vit_model",
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "image_size": 56,
            "window_size": 2,
            "global_attn_indexes": [1],
            "pretrain_image_size": 28,
        },
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "text_config": WIDTH
    | {
        "model_type": "clip_text_model",
        "vocab_size": 60,
        "intermediate_size": 32,
        "projection_dim": 16,
        "num_hidden_layers": 1,
        "max_position_embeddings": 32,
        "bos_token_id": 58,
        "eos_token_id": 59,
    },
    "geometry_encoder_config": LAYER,
    "detr_encoder_config": LAYER,
    "detr_decoder_config": LAYER | {"num_queries": 6},
    "mask_decoder_config": WIDTH,
}
PHRASES = ["mug", "a mug", "old  mug"] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SAM 3 for videos, as facebook publishes it: the model for photos is its detector."""
    folder = tmp_path_factory.mktemp("sam3") / "sam3"
    write_clip_tokenizer(folder)
    torch.manual_seed(0)
    model = Sam3Model(Sam3Config(**SIZES))
    with torch.no_grad():  # wider than at the start of training, so that queries differ
        for name, value in model.named_parameters():
            if "box_head" in name or "detr_decoder.query_embed" in name or "dot_product" in name:
                value.normal_(std=0.4)
    model.save_pretrained(folder)
    Sam3ImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder)
    state = {f"detector_model.{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    state |= {"tracker_model.no_memory_embedding": torch.zeros(1), "tracker_neck.bias": torch.zeros(1)}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    tree = {"model_type": "sam3_video", "detector_config": json.loads((folder / "config.json").read_text())}
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


@pytest.fixture(scope="module")
def models(folder: Path) -> GroundedSam:
    """The segmenter for clicks is a file that does not exist: nothing here needs it."""
    return load_grounded_sam(DetectorSpec(path=str(folder)), SamSpec(path="weights/none.pth"), "cpu", batch_size=4)


def test_best_box_and_mask_are_those_of_the_processor(
    models: GroundedSam, folder: Path, photos: list[Image.Image]
) -> None:
    assert isinstance(models, PhraseSam)
    model = Sam3Model.from_pretrained(folder).eval()
    processor = Sam3Processor(models.detector.processor, models.detector.tokenizer)
    shares = []
    for photo, phrase in zip(photos[2:5], PHRASES, strict=False):
        inputs = processor(images=photo, text=" ".join(phrase.split()), return_tensors="pt")
        with torch.no_grad():
            out = model(**{key: value for key, value in inputs.items() if key != "original_sizes"})
        size = [(photo.height, photo.width)]
        (every,) = processor.post_process_instance_segmentation(out, threshold=0.0, target_sizes=size)
        best = every["scores"].argmax()
        found, cut = models.cut_one(photo, phrase)
        assert found is not None and cut is not None
        assert found.score == pytest.approx(every["scores"][best].item(), abs=1e-6)
        x0, y0, x1, y1 = every["boxes"][best].tolist()
        expected = (max(x0, 0), max(y0, 0), min(x1, photo.width), min(y1, photo.height))
        assert found.box == pytest.approx(expected, abs=1e-3)
        assert cut.mask.dtype == bool and cut.mask.shape == (photo.height, photo.width)
        assert np.mean(cut.mask == every["masks"][best].bool().numpy()) > 0.999
        assert cut.score == 1.0
        assert models.detect([photo], [phrase]) == [found]
        shares.append(cut.mask.mean())
    assert len(set(shares)) > 1


def test_photos_do_not_depend_on_their_neighbours(models: GroundedSam, photos: list[Image.Image]) -> None:
    rows = [(number, models.prepare(photo), PHRASES[number]) for number, photo in enumerate(photos)]
    found = {number: (box, cut) for number, box, cut in models.cut_out(iter(rows), 0.0)}
    assert list(found) == list(range(9))
    for number, (box, cut) in found.items():
        alone, its = models.cut_one(photos[number], PHRASES[number])
        assert box == alone and cut is not None and its is not None and np.array_equal(cut.mask, its.mask)
    high = list(models.cut_out(iter(rows), 1.0))
    assert all(box is not None and cut is None for _, box, cut in high)
    assert models.detect(photos[:2], PHRASES[:2], threshold=1.0) == [None, None]
    assert rows[0][1].detector.dtype == torch.uint8


def test_a_reference_is_cut_out_by_it(models: GroundedSam, photos: list[Image.Image]) -> None:
    _, cut = models.cut_one(photos[3], "mug")
    assert cut is not None
    if cut.mask.any():
        assert np.array_equal(find_subject(photos[3], "mug", models, "photo"), cut.mask)
    assert models.name == f"sam3@{models.detector.revision[:12]}"
    assert models.detector.knows("mug")


def test_phrase_that_it_cannot_read_is_one_sentence(models: GroundedSam, photos: list[Image.Image]) -> None:
    assert models.reads("mug") and not models.reads("mug " * 40)
    with pytest.raises(ModelError, match=r"has \d+ tokens, but sam3 reads at most 32"):
        models.detect(photos[:1], ["mug " * 40])
    with pytest.raises(ModelError, match="contains no word"):
        models.detect(photos[:1], [" . "])
    with pytest.raises(ModelError, match="1 images and 0 phrases"):
        models.detect(photos[:1], [])


def test_clicks_are_for_the_segmenter_beside_it(folder: Path, sam2_folder: Path, photos: list[Image.Image]) -> None:
    spec = SamSpec(path=str(sam2_folder))
    models = load_grounded_sam(DetectorSpec(path=str(folder)), spec, "cpu", torch.bfloat16, batch_size=2)
    assert models.sam is models.sam
    mask, _ = models.sam.mask_of(models.sam.embed(photos[0]), points=[(3.0, 4.0, True)])
    assert mask.shape == (64, 64)
    found, cut = models.cut_one(photos[0], "mug")
    assert found is not None and cut is not None


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("missing", "1 missing weights for a transformers folder of SAM 3, first 'text_projection.bias'"),
        ("unexpected", "1 unexpected weights for a transformers folder of SAM 3"),
        ("processor", "cannot be read as a transformers folder of SAM 3"),
        ("vocabulary", "cannot be read as a transformers folder of SAM 3"),
    ],
)
def test_folder_with_a_fault_is_one_sentence(fault: str, said: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "sam3"))
    state = load_file(copy / "model.safetensors")
    if fault == "missing":
        del state["detector_model.text_projection.bias"]
    elif fault == "unexpected":
        state["detector_model.scale"] = torch.ones(1)
    elif fault == "processor":
        (copy / "preprocessor_config.json").unlink()
    else:
        (copy / "vocab.json").unlink()
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=said) as caught:
        load_grounded_sam(DetectorSpec(path=str(copy)), SamSpec(path="weights/none.pth"), "cpu")
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)
