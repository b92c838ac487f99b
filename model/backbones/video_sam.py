"""Grounded SAM over the frames of a video: SAM 2's memory (Ravi et al. 2024) follows a mask through them.

Steps and arithmetic are those of transformers' `Sam2VideoModel`. Its weights lie in the same folder as those that
`Sam2Segmenter` reads, whose image encoder it shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Sam2VideoModel, Sam2VideoProcessor, Sam2VideoVideoProcessor

from model.backbones.frozen import freeze
from model.backbones.grounded_sam import BoxSam, Detector, GroundedSam, folder_type
from model.backbones.hub import from_pretrained, resolve
from model.backbones.segmenters.detection import Cut, Detection
from model.backbones.segmenters.sam2 import FILES, Sam2Segmenter
from model.backbones.segmenters.segmenter import Box
from model.backbones.variant import SamSpec

VIDEO_TYPE = "sam2_video"
"""Model type of a folder with weights for videos."""


@dataclass(frozen=True)
class PreparedFrame:
    """A frame preprocessed for SAM 2, and for the detector if it is to be looked at."""

    size: tuple[int, int]
    """(height, width) of the frame, pixels."""
    sam: Tensor
    """uint8 [3, s, s]: see `Sam2Segmenter.prepare`."""
    detector: Tensor | None
    """[3, h, w] float32: see `Detector.prepare`."""


@dataclass(frozen=True)
class Followed:
    """An object's mask in a frame, as SAM 2's memory has it."""

    mask: np.ndarray
    """bool [H, W], of the frame's size; empty if `presence` is below 0.5."""
    score: float
    """Predicted IoU, 0..1."""
    presence: float
    """Probability that the object is in the frame, 0..1."""


class VideoMemory:
    """What SAM 2 remembers of one object in the frames of a video, which are known by their number.

    For a frame, the nearest ones count in which the object was shown, and the nearest before it (backwards: after it)
    in which it was followed.
    """

    def __init__(self, model: Sam2VideoModel, processor: Sam2VideoProcessor, frames: Sequence[PreparedFrame]) -> None:
        self._model, self._processor, self._sizes = model, processor, [frame.size for frame in frames]
        self._session = processor.init_video_session(inference_device=model.device)
        # As they are: the processor would keep all of them as float32. The image encoder normalises them.
        self._session.processed_frames = dict(enumerate(frame.sam for frame in frames))

    def show(self, number: int, mask: np.ndarray) -> None:
        """Take `mask`, bool [H, W] with at least one pixel, for the truth in a frame."""
        self.forget(number)  # else the mask would correct what was followed there, instead of replacing it
        self._processor.add_inputs_to_inference_session(
            self._session, frame_idx=number, obj_ids=0, input_masks=torch.from_numpy(mask)
        )
        self._run(number)
        self._session.remove_mask_inputs(obj_idx=0, frame_idx=number)

    def follow(self, number: int, backwards: bool) -> Followed:
        """Return the mask of a frame in which the object was not shown, and remember it.

        Args:
            backwards: whether the frames after it are the ones that were followed last.
        """
        scores: list[Tensor] = []  # which the library computes and does not return
        hook = self._model.mask_decoder.register_forward_hook(lambda _, inputs, outputs: scores.append(outputs[1]))
        try:
            out = self._run(number, backwards)
        finally:
            hook.remove()
        logits = F.interpolate(out.pred_masks.float(), self._sizes[number], mode="bilinear", align_corners=False)
        presence = out.object_score_logits.float().sigmoid()
        # Of several masks the model takes the one with the highest score.
        return Followed((logits[0, 0] > 0).cpu().numpy(), float(scores[-1].max()), float(presence))

    def forget(self, number: int) -> None:
        """Remove a frame from the memory, if it is there."""
        for frames in self._remembered():
            frames.pop(number, None)
        for followed in self._session.frames_tracked_per_obj.values():
            followed.pop(number, None)

    def _run(self, number: int, backwards: bool = False) -> Any:
        out = self._model(self._session, frame_idx=number, reverse=backwards)
        for frames in self._remembered():
            if number in frames:
                del frames[number]["high_res_masks"]  # most of what is kept, and read no more
        return out

    def _remembered(self) -> Iterator[dict[int, Any]]:
        """Yield the frames in which the object was shown, and those in which it was followed."""
        for outputs in self._session.output_dict_per_obj.values():
            yield from outputs.values()


@dataclass(frozen=True)
class VideoSam:
    """A detector, and a SAM 2 that cuts out the content of a box and follows it through a video.

    Frame by frame, as each needs the memory of those before it, so nothing depends on other videos.
    """

    detector: Detector
    segmenter: Sam2Segmenter
    model: Sam2VideoModel
    processor: Sam2VideoProcessor

    def prepare(self, image: Image.Image, look: bool) -> PreparedFrame:
        """`image` preprocessed, for the detector too if it is to `look`; on the CPU, for threads."""
        detector = self.detector.prepare(image) if look else None
        return PreparedFrame((image.height, image.width), self.segmenter.prepare(image), detector)

    def detect(self, frames: Sequence[PreparedFrame], phrase: str) -> list[Detection | None]:
        """The best box of `phrase` in each frame, all of them a batch; they must be prepared for the detector."""
        photos = [(n, one.detector, one.size, phrase) for n, one in enumerate(frames) if one.detector is not None]
        found = dict(replace(self.detector, batch_size=max(len(photos), 1)).find(photos))
        return [found[number] for number in range(len(frames))]

    def cut(self, frame: PreparedFrame, box: Box) -> Cut:
        """The mask of a box's content, from this frame alone."""
        (mask,), (score,) = self.segmenter.cut([(frame.sam, frame.size, box)])
        return Cut(mask, score)

    def memory(self, frames: Sequence[PreparedFrame]) -> VideoMemory:
        """An empty memory for the frames of a video, in order."""
        return VideoMemory(self.model, self.processor, frames)


def load_video_sam(models: GroundedSam, spec: SamSpec) -> VideoSam | None:
    """`models` for videos, with the memory of their segmenter `spec`.

    None if the segmenter is no SAM 2, or its folder is one for photos alone. Raises ModelError if weights are missing.
    """
    if not isinstance(models, BoxSam) or not isinstance(models.sam, Sam2Segmenter) or folder_type(spec) != VIDEO_TYPE:
        return None
    segmenter = replace(models.sam, batch_size=1)
    folder = resolve(spec, FILES)
    what = "a transformers folder of SAM 2 for videos"
    model = from_pretrained(Sam2VideoModel, folder, spec.path, what, dtype=torch.float32)
    model.vision_encoder = _SharedEncoder(segmenter)
    if model.config.max_cond_frame_num < 0:
        # As published: no limit to the frames shown, of which every other frame would read the whole feature map.
        model.config.max_cond_frame_num = model.config.num_maskmem
    processor = Sam2VideoProcessor(segmenter.processor, Sam2VideoVideoProcessor())
    return VideoSam(models.detector, segmenter, freeze(model, segmenter.model.device), processor)


class _SharedEncoder(nn.Module):
    """The segmenter's image encoder in the place of the video model's: the same weights, once in memory."""

    def __init__(self, segmenter: Sam2Segmenter) -> None:
        super().__init__()
        self._encode = segmenter.encoder_output  # no submodule: device and precision are the segmenter's

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        return self._encode(pixel_values)
