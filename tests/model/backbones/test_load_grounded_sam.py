import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from segment_anything import SamPredictor, sam_model_registry
from transformers import GroundingDinoProcessor

from model.backbones.grounded_sam import (
    Detector,
    GroundedSam,
    build_sam,
    canvas,
    load_detector,
    load_grounded_sam,
)
from model.backbones.segmenters.detection import elsewhere
from model.backbones.segmenters.sam import CHECKPOINTS, PUBLISHED, SamConfig, SamSegmenter, load_sam
from model.backbones.segmenters.segmenter import Box, PromptPoint
from model.backbones.variant import DetectorSpec, SamSpec, load_variant
from runtime.errors import ModelError

ROOT = Path(__file__).parents[3]
PHRASES = ["mug", "teddy bear", "dog"] * 3


@pytest.fixture(scope="module")
def models(detector_folder: Path, sam_folder: Path) -> GroundedSam:
    detector, sam = DetectorSpec(path=str(detector_folder)), SamSpec(path=str(sam_folder))
    return load_grounded_sam(detector, sam, "cpu", batch_size=4)


@pytest.fixture(scope="module")
def detector(models: GroundedSam) -> Detector:
    return models.detector


@pytest.fixture(scope="module", params=["grounding-dino", "mm-grounding-dino"])
def each_detector(request: pytest.FixtureRequest, detector_folder: Path, mm_detector_folder: Path) -> Detector:
    folder = detector_folder if request.param == "grounding-dino" else mm_detector_folder
    return load_detector(DetectorSpec(path=str(folder)), "cpu", batch_size=4)


def boxes_in(photos: list[Image.Image]) -> list[Box]:
    return [(0.2 * photo.width, 0.3 * photo.height, 0.8 * photo.width, 0.9 * photo.height) for photo in photos]


def test_detection_does_not_depend_on_its_neighbours(each_detector: Detector, photos: list[Image.Image]) -> None:
    together = each_detector.detect(photos, PHRASES)
    assert all(together)
    alone = [each_detector.detect([photo], [phrase])[0] for photo, phrase in zip(photos, PHRASES, strict=True)]
    assert together == alone
    assert each_detector.detect(photos[::-1], PHRASES[::-1])[::-1] == alone


def test_mask_does_not_depend_on_its_neighbours(models: GroundedSam, photos: list[Image.Image]) -> None:
    boxes = boxes_in(photos)
    masks, scores = models.segment(photos, boxes)
    for order in (slice(None), slice(None, None, -1)):
        again, same = models.segment(photos[order], boxes[order])
        assert same == scores[order]
        assert all(np.array_equal(a, b) for a, b in zip(again, masks[order], strict=True))
    for photo, box, mask, score in zip(photos, boxes, masks, scores, strict=True):
        (single,), (value,) = models.segment([photo], [box])
        assert np.array_equal(single, mask)
        assert value == score


def test_detection_is_the_best_of_the_processor(each_detector: Detector, photos: list[Image.Image]) -> None:
    """A photo on its own canvas and its phrase, through transformers' own preparation and post-processing."""
    for photo, phrase in ((photos[0], "mug"), (photos[1], "Teddy  Bear."), (photos[7], "a dog.")):
        text = " ".join(phrase.lower().replace(".", "").split()) + "."
        inputs = each_detector.processor(images=photo, text=text, return_tensors="pt")
        with torch.no_grad():
            outputs = each_detector.model(**inputs)
        size = [(photo.height, photo.width)]
        post_process = each_detector.processor.post_process_grounded_object_detection
        (every,) = post_process(outputs, threshold=0.0, target_sizes=size)
        best = every["scores"].argmax()
        (found,) = each_detector.detect([photo], [phrase])
        assert found is not None
        assert found.score == pytest.approx(every["scores"][best].item(), abs=1e-6)
        x0, y0, x1, y1 = every["boxes"][best].tolist()
        expected = (max(x0, 0), max(y0, 0), min(x1, photo.width), min(y1, photo.height))
        assert found.box == pytest.approx(expected, abs=1e-3)
        scores = [
            score
            for score, (left, upper, right, lower) in zip(
                every["scores"].tolist(), every["boxes"].tolist(), strict=True
            )
            if max(min(x1, right) - max(x0, left), 0) * max(min(y1, lower) - max(y0, upper), 0)
            < 0.5 * min((x1 - x0) * (y1 - y0), (right - left) * (lower - upper))
        ]
        assert found.other == pytest.approx(max(scores, default=0.0), abs=1e-6)


def test_parts_and_groups_are_no_second_subject() -> None:
    subject = torch.tensor([0.2, 0.2, 0.6, 0.8])
    boxes = {
        "itself": [0.2, 0.2, 0.6, 0.8],
        "a part": [0.3, 0.2, 0.5, 0.4],
        "a part and something below": [0.3, 0.6, 0.5, 0.9],
        "the pair it is in": [0.2, 0.2, 1.0, 0.8],
        "beside it": [0.5, 0.2, 0.9, 0.8],
        "touching it": [0.6, 0.2, 1.0, 0.8],
        "far away": [0.7, 0.9, 0.9, 1.0],
    }
    found = dict(zip(boxes, elsewhere(torch.tensor(list(boxes.values())), subject).tolist(), strict=True))
    assert [name for name, other in found.items() if other] == ["beside it", "touching it", "far away"]


def test_processor_as_transformers_5_saves_it_finds_the_same(
    detector: Detector, detector_folder: Path, tmp_path: Path, photos: list[Image.Image]
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(detector_folder / name, tmp_path)
    detector.processor.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.txt").exists()
    again = load_detector(DetectorSpec(path=str(tmp_path)), "cpu", batch_size=4)
    assert again.detect(photos, PHRASES) == detector.detect(photos, PHRASES)


def test_photos_that_are_not_resized_are_not_padded(detector: Detector) -> None:
    assert detector.edges() == (64, 107)
    for change in ({"do_resize": False}, {"size": {"height": 64, "width": 64}}):
        image_processor = type(detector.processor.image_processor)(**change)
        processor = GroundingDinoProcessor(image_processor, detector.processor.tokenizer)
        assert replace(detector, processor=processor).edges() == (None, None)


def test_boxes_lie_in_their_photos(models: GroundedSam, photos: list[Image.Image]) -> None:
    for photo, found in zip(photos, models.detect(photos, PHRASES), strict=True):
        assert found is not None
        x0, y0, x1, y1 = found.box
        assert 0 <= x0 < x1 <= photo.width
        assert 0 <= y0 < y1 <= photo.height
        assert 0 < found.score <= 1


def test_nothing_above_the_threshold_is_none(models: GroundedSam, photos: list[Image.Image]) -> None:
    assert models.detect(photos[:3], PHRASES[:3], threshold=1.0) == [None] * 3
    assert models.detect([], []) == []


@pytest.mark.parametrize("phrase", ["", " . "])
def test_empty_phrase_is_refused(models: GroundedSam, photos: list[Image.Image], phrase: str) -> None:
    with pytest.raises(ModelError, match="contains no word"):
        models.detect(photos[:1], [phrase])


def test_lists_of_different_length_are_refused(models: GroundedSam, photos: list[Image.Image]) -> None:
    with pytest.raises(ModelError, match="9 images and 1 phrases"):
        models.detect(photos, ["mug"])
    with pytest.raises(ModelError, match="9 images and 0 boxes"):
        models.segment(photos, [])
    with pytest.raises(ModelError, match=r"has 18 tokens, but .* reads at most 16"):
        models.detect(photos[:1], ["dog " * 15])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((800, 800), (800, 800)),
        ((800, 1066), (800, 1088)),
        ((1066, 800), (1088, 800)),
        ((800, 1200), (800, 1333)),
        ((500, 1333), (800, 1333)),
        ((1333, 1), (1333, 800)),
    ],
)
def test_canvas_is_one_of_five_and_holds_the_photo(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert canvas(*size, 800, 1333) == expected
    assert canvas(*size, None, None) == size


def test_masks_are_those_of_the_predictor_at_the_photos_size(models: GroundedSam, photos: list[Image.Image]) -> None:
    boxes = boxes_in(photos)
    masks, scores = models.segment(photos, boxes)
    predictor = SamPredictor(models.sam.model)
    for photo, box, mask, score in zip(photos, boxes, masks, scores, strict=True):
        predictor.set_image(np.array(photo))
        expected, quality, _ = predictor.predict(box=np.array(box), multimask_output=False)
        assert mask.dtype == bool
        assert mask.shape == (photo.height, photo.width)
        assert np.mean(mask == expected[0]) > 0.999
        assert score == pytest.approx(float(quality[0]), abs=1e-4)


PROMPTS: dict[str, tuple[bool, list[PromptPoint]]] = {
    "a point": (False, [(30.0, 20.5, True)]),
    "two points": (False, [(30.0, 20.5, True), (8.0, 9.0, False)]),
    "a box and a point": (True, [(30.0, 20.5, False)]),
    "a box": (True, []),
}
"""Whether a box is given, and the points."""


def as_published(monkeypatch: pytest.MonkeyPatch, sam_folder: Path, tmp_path: Path) -> SamSegmenter:
    """The weights of `sam_folder` as a checkpoint in the published format, of a size that stands in for ViT-B."""
    sizes = SamConfig(**json.loads((sam_folder / "config.json").read_text()))
    monkeypatch.setitem(PUBLISHED, "vit_b", sizes)  # type: ignore[arg-type]
    state = {name: value.float() for name, value in load_file(sam_folder / "model.safetensors").items()}
    torch.save(state, tmp_path / "sam.pth")
    return load_sam(SamSpec(path=str(tmp_path / "sam.pth"), size="vit_b"), "cpu")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("source", ["folder", "published", "toybox"])
def test_masks_of_boxes_and_points_are_those_of_the_predictor(
    source: str, prompt: str, models: GroundedSam, sam_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source == "toybox":
        segmenter = load_sam(load_variant("toybox").sam, "cpu")
    else:
        segmenter = models.sam if source == "folder" else as_published(monkeypatch, sam_folder, tmp_path)
    photo = Image.open(ROOT / "docs" / "toybox_reference.png").convert("RGB").resize((64, 48))
    has_box, points = PROMPTS[prompt]
    box = (12.0, 10.0, 50.0, 40.0) if has_box else None
    predictor = SamPredictor(segmenter.model)
    predictor.set_image(np.array(photo))
    expected, quality, _ = predictor.predict(
        box=None if box is None else np.array(box),
        point_coords=np.array([point[:2] for point in points]) if points else None,
        point_labels=np.array([int(point[2]) for point in points]) if points else None,
        multimask_output=prompt == "a point",
    )
    mask, score = segmenter.mask_of(segmenter.embed(photo), box, points)
    best = quality.argmax()
    assert mask.dtype == bool and mask.shape == (48, 64)
    assert np.mean(mask == expected[best]) > 0.999
    assert score == pytest.approx(float(quality[best]), abs=1e-4)


def test_one_point_on_it_finds_the_toybox_s_subject_as_well_as_its_box() -> None:
    segmenter = load_sam(load_variant("toybox").sam, "cpu")
    photo = segmenter.embed(Image.open(ROOT / "docs" / "toybox_reference.png").convert("RGB"))
    by_box, _ = segmenter.mask_of(photo, (13.3, 14.3, 50.6, 51.2))
    by_point, _ = segmenter.mask_of(photo, points=[(30.0, 33.0, True)])
    assert (by_box & by_point).sum() / (by_box | by_point).sum() > 0.9


def test_prompt_without_box_and_point_is_refused(models: GroundedSam, photos: list[Image.Image]) -> None:
    with pytest.raises(ModelError, match="neither a box nor a point"):
        models.sam.mask_of(models.sam.embed(photos[0]))


def test_half_precision_image_encoder_gives_nearly_the_same_masks(
    models: GroundedSam, detector_folder: Path, sam_folder: Path, photos: list[Image.Image]
) -> None:
    detector, sam = DetectorSpec(path=str(detector_folder)), SamSpec(path=str(sam_folder))
    half = load_grounded_sam(detector, sam, "cpu", torch.bfloat16, 4)
    masks, _ = models.segment(photos, boxes_in(photos))
    for mask, other in zip(masks, half.segment(photos, boxes_in(photos))[0], strict=True):
        assert np.mean(mask == other) > 0.9
    assert all(half.detect(photos, PHRASES))


@pytest.mark.parametrize("size", ["vit_b", "vit_l", "vit_h"])
def test_published_sizes_have_the_names_and_shapes_of_the_registry(size: str) -> None:
    with torch.device("meta"):
        ours, theirs = build_sam(PUBLISHED[size]).state_dict(), sam_model_registry[size]().state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


def published_checkpoint(file: Path, size: str) -> dict[str, torch.Tensor]:
    """A `.pth` with the registry's names and shapes; a tensor is one number seen many times, so the file is small."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in sam_model_registry[size]().state_dict().items()}
    state = {name: torch.full((1,), 0.5).expand(shape) for name, shape in shapes.items()}
    torch.save(state, file)
    return state


def test_published_vit_h_checkpoint_loads(tmp_path: Path) -> None:
    published_checkpoint(tmp_path / CHECKPOINTS["vit_h"], "vit_h")
    segmenter = load_sam(SamSpec(path=str(tmp_path / CHECKPOINTS["vit_h"]), size="vit_h"), "cpu")
    assert sum(p.numel() for p in segmenter.model.parameters()) == 641_090_608
    assert not any(p.is_meta or p.requires_grad for p in segmenter.model.parameters())
    assert not any(buffer.is_meta for buffer in segmenter.model.buffers())
    assert segmenter.model.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])


def test_checkpoint_of_another_size_is_one_sentence(tmp_path: Path) -> None:
    published_checkpoint(tmp_path / "sam.pth", "vit_b")
    with pytest.raises(ModelError, match=r"sam.pth|cannot be read as SAM vit_l") as caught:
        load_sam(SamSpec(path=str(tmp_path / "sam.pth"), size="vit_l"), "cpu")
    assert "\n" not in str(caught.value)


def test_checkpoint_with_other_bytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "sam.pth").write_bytes(b"anything")
    with pytest.raises(ModelError, match=r"SHA-256 is \w+, not 0{64}; download https.*sam_vit_h_4b8939.pth again"):
        load_sam(SamSpec(path=str(tmp_path / "sam.pth"), size="vit_h", sha256="0" * 64), "cpu")


def test_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": Path("x")}, tmp_path / "sam.pth")
    with pytest.raises(ModelError, match="cannot be read as SAM vit_b") as caught:
        load_sam(SamSpec(path=str(tmp_path / "sam.pth"), size="vit_b"), "cpu")
    assert "\n" not in str(caught.value)


def test_missing_checkpoint_says_where_to_get_it_and_where_to_put_it() -> None:
    spec = load_variant("sd15").sam.model_copy(update={"path": "weights/absent/sam_vit_h_4b8939.pth"})
    with pytest.raises(ModelError) as caught:
        load_sam(spec, "cpu")
    assert str(caught.value) == (
        "weights/absent/sam_vit_h_4b8939.pth: no such file or folder; download"
        " https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth to weights/absent/sam_vit_h_4b8939.pth"
    )


def test_sam_folder_with_faults_is_one_sentence(sam_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sam_folder, tmp_path / "sam"))
    spec = SamSpec(path=str(folder))
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"heads": 3}, "heads 3 does not divide width 32"),
        ({"colour": 1}, "colour: Extra inputs are not permitted"),
        ({"prompt_embed_dim": 20}, "prompt_embed_dim 20 must be a multiple"),
        ({"depth": 3}, "cannot be read as SAM weights"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=message) as caught:
            load_sam(spec, "cpu")
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"cannot be read as a SAM folder with config.json"):
        load_sam(spec, "cpu")
    shutil.copy(sam_folder / "config.json", folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ModelError, match="cannot be read as SAM weights"):
        load_sam(spec, "cpu")


def test_detector_with_faults_is_one_sentence(detector_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(detector_folder, tmp_path / "detector"))
    state = load_file(folder / "model.safetensors")
    gone = "model.level_embed"
    save_file(
        {key: value for key, value in state.items() if key != gone}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=f"detector: 1 missing weights for .* first '{gone}'"):
        load_detector(DetectorSpec(path=str(folder)), "cpu")
    shutil.copy(detector_folder / "model.safetensors", folder)
    (folder / "vocab.txt").unlink()
    with pytest.raises(ModelError, match="detector: cannot be read as a transformers folder of Grounding DINO"):
        load_detector(DetectorSpec(path=str(folder)), "cpu")
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ModelError, match="detector: cannot be read as a transformers folder of Grounding DINO"):
        load_detector(DetectorSpec(path=str(folder)), "cpu")


def test_name_holds_both_models(models: GroundedSam) -> None:
    first, second = models.name.split("+")
    assert first == f"{models.detector.name}@{models.detector.revision[:12]}"
    assert second == f"{models.sam.name}@{models.sam.revision[:12]}"
