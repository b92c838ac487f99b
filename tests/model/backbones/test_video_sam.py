"""SAM 2's memory of videos: masks, scores and what is remembered are those of transformers' own session."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Sam2ImageProcessor, Sam2Model, Sam2Processor, Sam2VideoModel
from transformers.models.sam2_video import Sam2VideoProcessor, Sam2VideoVideoProcessor

from model.backbones.grounded_sam import load_grounded_sam
from model.backbones.variant import DetectorSpec, SamSpec
from model.backbones.video_sam import VideoMemory, VideoSam, load_video_sam
from runtime.errors import ModelError

FRAMES, WIDTH, HEIGHT = 7, 96, 72


def load(detector: Path, sam: Path, dtype: torch.dtype = torch.float32) -> VideoSam | None:
    spec = SamSpec(path=str(sam))
    return load_video_sam(load_grounded_sam(DetectorSpec(path=str(detector)), spec, "cpu", dtype, 4), spec)


@pytest.fixture(scope="module")
def models(detector_folder: Path, sam2_folder: Path) -> VideoSam:
    loaded = load(detector_folder, sam2_folder)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def film() -> list[Image.Image]:
    """Noise that drifts."""
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (HEIGHT, WIDTH + 6 * FRAMES, 3), dtype=np.uint8)
    return [Image.fromarray(noise[:, 6 * n : 6 * n + WIDTH]) for n in range(FRAMES)]


def shown(number: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[20:50, 20 + 4 * number : 50 + 4 * number] = True
    return mask


def remembered(models: VideoSam, film: list[Image.Image]) -> VideoMemory:
    return models.memory([models.prepare(image, look=False) for image in film])


class OfTheLibrary:
    """transformers' own session on the same frames."""

    def __init__(self, folder: Path, film: list[Image.Image]) -> None:
        size = {"height": 64, "width": 64}
        self.model = Sam2VideoModel.from_pretrained(folder).eval()
        self.processor = Sam2VideoProcessor(
            Sam2ImageProcessor.from_pretrained(folder), Sam2VideoVideoProcessor(size=size)
        )
        self.session = self.processor.init_video_session(video=film)

    def show(self, number: int, mask: np.ndarray) -> None:
        self.processor.add_inputs_to_inference_session(self.session, frame_idx=number, obj_ids=1, input_masks=mask)
        self.model(self.session, frame_idx=number)

    def propagate(self, start: int, reverse: bool) -> Iterator[tuple[int, np.ndarray, float]]:
        for out in self.model.propagate_in_video_iterator(self.session, start_frame_idx=start, reverse=reverse):
            masks = self.processor.post_process_masks([out.pred_masks], [[HEIGHT, WIDTH]])[0]
            yield out.frame_idx, masks[0, 0].numpy(), float(out.object_score_logits.sigmoid())


def test_masks_in_both_directions_are_those_of_the_library(
    models: VideoSam, sam2_folder: Path, film: list[Image.Image]
) -> None:
    library, ours = OfTheLibrary(sam2_folder, film), remembered(models, film)
    start, masks = 3, []
    for one in (library, ours):
        one.show(start, shown(start))
    for reverse in (False, True):
        for number, mask, presence in library.propagate(start, reverse):
            if number == start:
                continue
            followed = ours.follow(number, reverse)
            assert followed.mask.dtype == bool and followed.mask.shape == (HEIGHT, WIDTH)
            assert np.mean(followed.mask == mask) > 0.999
            assert followed.presence == pytest.approx(presence, abs=1e-5)
            assert 0.5 < followed.presence < 1 and 0 <= followed.score <= 1
            masks.append(mask)
    assert len(masks) == FRAMES - 1 and 0 < np.mean(masks) < 1
    assert len({mask.tobytes() for mask in masks}) == FRAMES - 1


def test_score_is_the_predicted_iou_of_the_mask_that_the_model_takes(
    models: VideoSam, film: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, seen = remembered(models, film), []
    head = models.model._single_frame_forward

    def spied(**settings):
        seen.append(head(**settings))
        return seen[-1]

    ours.show(0, shown(0))
    monkeypatch.setattr(models.model, "_single_frame_forward", spied)
    assert ours.follow(1, False).score == float(seen[0].iou_scores.max())
    assert seen[0].iou_scores.numel() == 3  # of several masks, as SAM 2 does in frames without a prompt


def test_frame_that_was_lost_and_shown_again_counts_as_if_it_had_never_been_followed(
    models: VideoSam, sam2_folder: Path, film: list[Image.Image]
) -> None:
    library, ours = OfTheLibrary(sam2_folder, film), remembered(models, film)
    for one in (library, ours):
        one.show(0, shown(0))
    for number, _, _ in library.propagate(0, False):
        if number:
            ours.follow(number, False)
        if number == 2:
            break
    corrected = shown(5)
    ours.follow(3, False)
    ours.forget(3)
    for one in (library, ours):
        one.show(3, corrected)
    (_, _, _), (number, expected, _) = (next(found) for found in [library.propagate(3, False)] * 2)
    followed = ours.follow(4, False)
    assert number == 4 and np.mean(followed.mask == expected) > 0.999
    ours.show(4, corrected)  # forgets by itself
    assert set(ours._session.output_dict_per_obj[0]["cond_frame_outputs"]) == {0, 3, 4}


def test_memory_of_many_frames_is_bounded(models: VideoSam, film: list[Image.Image]) -> None:
    ours, read = remembered(models, film * 2), []

    def spy(module, args, settings):
        read.append(settings["memory"].shape[0] - settings["num_object_pointer_tokens"])

    hook = models.model.memory_attention.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        for number in range(9):
            ours.show(number, shown(number % FRAMES))
        ours.follow(9, False)
    finally:
        hook.remove()
    assert read == [7 * 4 * 4]  # seven feature maps
    assert {"high_res_masks"}.isdisjoint(key for frames in ours._remembered() for one in frames.values() for key in one)
    assert not ours._session.mask_inputs_per_obj[0]


def test_boxes_and_their_masks_are_those_of_photos(models: VideoSam, film: list[Image.Image]) -> None:
    found = models.detect([models.prepare(image, look=True) for image in film[:3]], "mug")
    expected = models.detector.detect(film[:3], ["mug"] * 3)
    for image, one, other in zip(film, found, expected, strict=False):
        assert one is not None and other is not None
        assert one.box == pytest.approx(other.box, abs=1e-3) and one.score == pytest.approx(other.score, abs=1e-5)
        cut = models.cut(models.prepare(image, look=False), one.box)
        (mask,), (score,) = replace(models.segmenter, batch_size=4).segment([image], [one.box])
        assert np.mean(cut.mask == mask) > 0.999 and cut.score == pytest.approx(score, abs=1e-5)
    assert models.detect([], "mug") == []


def test_image_encoder_is_the_segmenter_s_in_its_precision(
    models: VideoSam, detector_folder: Path, sam2_folder: Path, film: list[Image.Image]
) -> None:
    half = load(detector_folder, sam2_folder, torch.bfloat16)
    assert half is not None
    assert {p.dtype for p in half.segmenter.model.vision_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert not any(name.startswith("vision_encoder") for name, _ in half.model.named_parameters())
    masks = []
    for one in (models, half):
        memory = remembered(one, film)
        memory.show(0, shown(0))
        masks.append(memory.follow(1, False).mask)
    assert np.mean(masks[0] == masks[1]) > 0.9


def test_only_a_sam2_with_weights_for_videos_has_a_memory(
    detector_folder: Path, sam_folder: Path, sam2_folder: Path, tmp_path: Path
) -> None:
    assert load(detector_folder, sam_folder) is None
    Sam2Model.from_pretrained(sam2_folder).save_pretrained(tmp_path)
    Sam2Processor(Sam2ImageProcessor.from_pretrained(sam2_folder)).save_pretrained(tmp_path)
    assert load(detector_folder, tmp_path) is None
    (tmp_path / "config.json").write_text((sam2_folder / "config.json").read_text())
    with pytest.raises(ModelError, match="missing weights for a transformers folder of SAM 2 for videos, first '"):
        load(detector_folder, tmp_path)
