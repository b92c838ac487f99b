"""SAM 2 and 2.1 in the place of SAM: masks and scores are those of transformers' processor and model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Sam2ImageProcessor, Sam2Model, Sam2Processor

from model.backbones.grounded_sam import load_grounded_sam, load_segmenter
from model.backbones.segmenters.sam import SamSegmenter
from model.backbones.segmenters.sam2 import Sam2Segmenter
from model.backbones.segmenters.segmenter import Box, PromptPoint, Segmenter
from model.backbones.variant import DetectorSpec, SamSpec
from runtime.errors import ModelError

PROMPTS: dict[str, tuple[bool, list[PromptPoint]]] = {
    "a box": (True, []),
    "a point": (False, [(30.0, 20.5, True)]),
    "two points": (False, [(30.0, 20.5, True), (8.0, 9.0, False)]),
    "a box and a point": (True, [(30.0, 20.5, False)]),
}
"""Whether a box is given, and the points."""


@pytest.fixture(scope="module")
def segmenter(sam2_folder: Path) -> Segmenter:
    return load_segmenter(SamSpec(path=str(sam2_folder)), "cpu", batch_size=4)


def box_in(photo: Image.Image) -> Box:
    return 0.2 * photo.width, 0.3 * photo.height, 0.8 * photo.width, 0.9 * photo.height


def of_the_library(
    folder: Path, photo: Image.Image, box: Box | None, points: Sequence[PromptPoint]
) -> tuple[np.ndarray, np.ndarray]:
    """Every mask and score that the library gives for a prompt: three for a single point."""
    model = Sam2Model.from_pretrained(folder).eval()
    processor = Sam2Processor(Sam2ImageProcessor.from_pretrained(folder))
    prompt = {} if box is None else {"input_boxes": [[list(box)]]}
    if points:
        prompt["input_points"] = [[[[x, y] for x, y, _ in points]]]
        prompt["input_labels"] = [[[int(on_subject) for *_, on_subject in points]]]
    inputs = processor(images=photo, return_tensors="pt", **prompt)
    with torch.no_grad():
        out = model(
            **{k: v for k, v in inputs.items() if k != "original_sizes"},
            multimask_output=box is None and len(points) == 1,
        )
    masks = processor.post_process_masks(out.pred_masks, inputs["original_sizes"])[0][0]
    return masks.numpy(), out.iou_scores[0, 0].numpy()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_masks_of_boxes_and_points_are_those_of_the_library(
    prompt: str, segmenter: Segmenter, sam2_folder: Path, photos: list[Image.Image]
) -> None:
    has_box, points = PROMPTS[prompt]
    masks = []
    for photo in photos[2:5]:
        box = box_in(photo) if has_box else None
        expected, scores = of_the_library(sam2_folder, photo, box, points)
        mask, score = segmenter.mask_of(segmenter.embed(photo), box, points)
        best = scores.argmax()
        assert len(scores) == (3 if prompt == "a point" else 1)
        assert mask.dtype == bool and mask.shape == (photo.height, photo.width)
        assert np.mean(mask == expected[best]) > 0.999
        assert score == pytest.approx(float(scores[best]), abs=1e-5)
        masks.append(mask)
    assert 0 < np.mean(np.concatenate([mask.ravel() for mask in masks])) < 1


def test_mask_does_not_depend_on_its_neighbours(segmenter: Segmenter, photos: list[Image.Image]) -> None:
    boxes = [box_in(photo) for photo in photos]
    masks, scores = segmenter.segment(photos, boxes)
    for photo, box, mask, score in zip(photos, boxes, masks, scores, strict=True):
        (single,), (value,) = segmenter.segment([photo], [box])
        assert np.array_equal(single, mask) and value == score
    assert segmenter.prepare(photos[2]).dtype == torch.uint8
    assert segmenter.segment([], []) == ([], [])


def test_folder_says_which_segmenter_it_is(
    segmenter: Segmenter, sam_folder: Path, sam2_folder: Path, tmp_path: Path, photos: list[Image.Image]
) -> None:
    """A folder for photos alone, without the weights for videos, gives the same masks."""
    assert isinstance(load_segmenter(SamSpec(path=str(sam_folder)), "cpu"), SamSegmenter)
    assert isinstance(segmenter, Sam2Segmenter)
    Sam2Model.from_pretrained(sam2_folder).save_pretrained(tmp_path)
    Sam2Processor(segmenter.processor).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sam2"
    alone = load_segmenter(SamSpec(path=str(tmp_path)), "cpu", batch_size=4)
    boxes = [box_in(photo) for photo in photos[:3]]
    (masks, scores), (others, same) = (one.segment(photos[:3], boxes) for one in (segmenter, alone))
    assert scores == same and all(np.array_equal(a, b) for a, b in zip(masks, others, strict=True))


def test_grounded_sam_cuts_out_with_it(detector_folder: Path, sam2_folder: Path, photos: list[Image.Image]) -> None:
    models = load_grounded_sam(
        DetectorSpec(path=str(detector_folder)), SamSpec(path=str(sam2_folder)), "cpu", torch.bfloat16, batch_size=2
    )
    rows = [(number, models.prepare(photo), "mug") for number, photo in enumerate(photos[:5])]
    found = {number: (box, cut) for number, box, cut in models.cut_out(iter(rows), 0.0)}
    assert sorted(found) == list(range(5))
    for number, (box, cut) in found.items():
        assert box is not None and cut is not None
        mask, score = models.sam.mask_of(models.sam.embed(photos[number]), box.box)
        assert cut.mask.shape == mask.shape and np.mean(cut.mask == mask) > 0.9
        assert cut.score == pytest.approx(score, abs=0.02)
    assert models.name.endswith(f"{sam2_folder.name}@{models.sam.revision[:12]}")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("type", "config.json is of a sam, expected sam2 or sam2_video"),
        ("missing", "1 missing weights for a transformers folder of SAM 2, first 'no_memory_embedding'"),
        ("unexpected", "1 unexpected weights for a transformers folder of SAM 2, first 'head.scale'"),
        ("processor", "cannot be read as a transformers folder of SAM 2"),
        ("digest", "SHA-256 is [0-9a-f]{64}, not 0{64}; download the file again"),
    ],
)
def test_folder_with_a_fault_is_one_sentence(fault: str, said: str, sam2_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sam2_folder, tmp_path / "sam2"))
    config, weights = folder / "config.json", folder / "model.safetensors"
    state = load_file(weights)
    if fault == "type":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "sam"}))
    elif fault == "missing":
        del state["no_memory_embedding"]
    elif fault == "unexpected":
        state["head.scale"] = torch.ones(1)
    elif fault == "processor":
        (folder / "preprocessor_config.json").unlink()
    save_file(state, weights, {"format": "pt"})
    spec = SamSpec(path=str(folder), sha256="0" * 64 if fault == "digest" else None)
    with pytest.raises(ModelError, match=said) as caught:
        load_segmenter(spec, "cpu")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
