"""Photos of a subject -> masks, shipped with the photo, cut out by Grounded SAM, or followed through a video."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from model.backbones.grounded_sam import GroundedSam, Prepared, load_grounded_sam
from model.backbones.variant import load_variant
from model.backbones.video_sam import PreparedFrame, VideoSam, load_video_sam
from model.images.segment import mask_box
from pipelines import tables
from pipelines.engine.shards import Rows
from pipelines.mask.quality import Box, QualityParams, border_contact, box_iou, clean, iou, quality_flag
from pipelines.mask.tracking import MaskResult, PreparedVideo, TrackingParams, evenly, track, videos
from pipelines.photos.decode import DecodeError, decode_image, decode_mask_image
from pipelines.photos.prefetch import prefetch
from pipelines.photos.roots import Roots, SourceParams
from runtime.errors import UserError
from runtime.params import Section


class MaskParams(Section):
    """Where masks come from and when they are good."""

    method: Literal["annotated", "grounded_sam"]  # annotated: masks shipped with the photos, Grounded SAM for the rest
    phrase: str  # prompt of the detector; {class} is the class noun
    min_detection: float  # score below which a detection does not count, 0..1
    batch_size: int = Field(ge=1)
    dtype: Literal["float32", "float16", "bfloat16"]
    compare: float  # share of the photos with a shipped mask that Grounded SAM segments too, 0..1
    track: bool  # frames of a video together, where the segmenter is a SAM 2 for videos
    tracking: TrackingParams
    quality: QualityParams
    shard_subjects: int = Field(ge=1)


@dataclass
class Opened:
    """A photo in progress; the photo itself is released as soon as the models' input has been prepared from it.

    Attributes:
        order: its position among the photos of a call.
        tracked: whether it is masked together with other frames of its video.
        looked: whether the detector looks at it before the subject is followed; only of a tracked one.
        shipped: the mask shipped with it, [H, W], at its size; None if there is none or it is not needed.
        prepared: the models' input; None if only the shipped mask is needed, or it is tracked.
        video_frame: the input of a tracked one.
        reject: (reason, detail) if it is dropped.
        result: what the models found; None if they did not run.
        rows: the result, one row per table; then the pixels have been released.
    """

    order: int
    frame: dict[str, Any]
    tracked: bool = False
    looked: bool = False
    shipped: np.ndarray | None = None
    prepared: Prepared | None = None
    video_frame: PreparedFrame | None = None
    reject: tuple[str, str] | None = None
    result: MaskResult | None = None
    rows: dict[str, dict[str, Any]] | None = None


class MaskWorker:
    """Reads the photos of subjects and returns their masks.

    Photos are streamed: `decoders` threads read and downscale the next ones while the models process the current ones,
    and clean and encode the masks of the previous ones. The frames of a video that are tracked are held together.
    """

    def __init__(
        self, params: MaskParams, variant: str, sources: Sequence[SourceParams], device: str, decoders: int = 0
    ) -> None:
        self.params, self.variant, self.device, self.decoders = params, variant, device, decoders
        self.roots = Roots(sources)
        self.model: GroundedSam | None = None

    def compute(self, payloads: Sequence[list[dict[str, Any]]]) -> list[Rows]:
        results: list[Rows] = [{"masks": [], "rejects": [], "agreement": []} for _ in payloads]
        places = [rows for rows, frames in zip(results, payloads, strict=True) for _ in frames]
        frames = [frame for payload in payloads for frame in payload]
        if self.model is None and any(self.wants_model(frame) for frame in frames):
            self.model = self.load()
        tracked = self.tracked(frames)
        for source in {frame["source"] for frame in frames}:
            self.roots[source]  # opened here, not concurrently by several threads
        ahead = 2 * self.params.batch_size  # a batch on the device, the next one ready
        together = set(chain.from_iterable(tracked))
        alone = [Opened(order, frame) for order, frame in enumerate(frames) if order not in together]
        groups = [self.video(frames, group) for group in tracked]
        opened = prefetch(self.open, chain(alone, *groups), self.decoders, ahead)
        masked = chain(
            self.cut_out(islice(opened, len(alone))),
            *(self.follow(islice(opened, len(group))) for group in groups),
        )
        finished = prefetch(self.finish, masked, self.decoders, ahead)
        for photo in sorted(finished, key=lambda photo: photo.order):
            for name, row in (photo.rows or {}).items():
                places[photo.order][name].append(row)
        return results

    def load(self) -> GroundedSam:
        """Return the models of the variant."""
        variant, dtype = load_variant(self.variant), getattr(torch, self.params.dtype)
        size = self.params.batch_size
        return load_grounded_sam(variant.detector, variant.sam, self.device, batch_size=size, dtype=dtype)

    @cached_property
    def video_sam(self) -> VideoSam | None:
        """The models with their memory of videos; None if they have none."""
        return None if self.model is None else load_video_sam(self.model, load_variant(self.variant).sam)

    def tracked(self, frames: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Return the positions of the frames that are masked together, by video, in the order of time."""
        if not self.params.track:
            return []
        wanted = [order for order, frame in enumerate(frames) if not self.takes_shipped(frame)]
        groups = videos([frames[order] for order in wanted])
        if not groups or self.video_sam is None:
            return []
        return [[wanted[position] for position in group] for group in groups]

    def video(self, frames: Sequence[dict[str, Any]], group: Sequence[int]) -> list[Opened]:
        """Return the frames of a video, not read yet."""
        looked = {group[number] for number in evenly(len(group), self.params.tracking.looks)}
        return [Opened(order, frames[order], tracked=True, looked=order in looked) for order in group]

    def takes_shipped(self, frame: dict[str, Any]) -> bool:
        """Whether this photo's mask is the shipped one."""
        return self.params.method == "annotated" and frame["mask_path"] is not None

    def compares(self, frame: dict[str, Any]) -> bool:
        """Whether both methods are run: if Grounded SAM runs anyway, otherwise for a share of the photos, by id."""
        if frame["mask_path"] is None:
            return False
        share = zlib.crc32(frame["frame_id"].encode()) / 2**32
        return self.params.method == "grounded_sam" or share < self.params.compare

    def wants_model(self, frame: dict[str, Any]) -> bool:
        """Whether Grounded SAM runs on this photo."""
        return not self.takes_shipped(frame) or self.compares(frame)

    def open(self, photo: Opened) -> Opened:
        """Read a photo and prepare the models' input, or its rows if no model is needed; called by threads."""
        self.read(photo)
        return self.finish(photo) if photo.prepared is None and photo.video_frame is None else photo

    def read(self, photo: Opened) -> None:
        """Set everything about a photo that is known before the models run."""
        frame = photo.frame
        try:
            image = self.image(frame)
        except DecodeError as error:
            photo.reject = (error.reason, error.detail)
            return
        except FileNotFoundError:
            photo.reject = ("missing_file", frame["path"])
            return
        if frame["mask_path"] is not None and (self.takes_shipped(frame) or self.compares(frame)):
            try:
                photo.shipped = self.shipped(frame, image)
            except DecodeError as error:
                if self.takes_shipped(frame):
                    photo.reject = (error.reason, error.detail)
                    return
        if photo.tracked and self.video_sam is not None:
            photo.video_frame = self.video_sam.prepare(image, photo.looked)
        elif self.model is not None and self.wants_model(frame):
            photo.prepared = self.model.prepare(image)

    def image(self, frame: dict[str, Any]) -> Image.Image:
        """Return a photo; raises DecodeError or FileNotFoundError."""
        return decode_image(self.roots[frame["source"]].read(frame["path"]))

    def shipped(self, frame: dict[str, Any], image: Image.Image) -> np.ndarray:
        """Return the shipped mask [H, W]; its size may differ (Open Images), its aspect ratio may not."""
        try:
            mask = decode_mask_image(self.roots[frame["source"]].read(frame["mask_path"]))
        except (DecodeError, FileNotFoundError) as error:
            raise DecodeError("mask_unreadable", f"{frame['mask_path']}: {error}") from None
        height, width = mask.shape
        if abs(width / height - image.width / image.height) > 0.02 * image.width / image.height:
            detail = f"{frame['mask_path']}: {width} x {height} for a photo of {image.width} x {image.height}"
            if (width, height) == (image.height, image.width):
                detail += ", upright by its EXIF orientation if it has one; turn the mask"
            raise DecodeError("mask_unreadable", detail)
        return np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))

    def cut_out(self, photos: Iterator[Opened]) -> Iterator[Opened]:
        """Yield every photo, with box and mask of its subject if the models ran and found it."""
        done: list[Opened] = []

        def requests() -> Iterator[tuple[Opened, Prepared, str]]:
            for photo in photos:
                if photo.prepared is None or self.model is None:
                    done.append(photo)  # its rows are known
                elif not self.model.reads(self.phrase(photo.frame)):
                    if not self.takes_shipped(photo.frame):
                        photo.reject = ("phrase_too_long", self.phrase(photo.frame))
                    done.append(photo)
                else:
                    prepared, photo.prepared = photo.prepared, None
                    yield photo, prepared, self.phrase(photo.frame)

        if self.model is None:
            yield from photos
            return
        for photo, found, cut in self.model.cut_out(requests(), self.params.min_detection):
            photo.result = MaskResult("grounded_sam", found, cut)
            yield photo
            yield from done
            done.clear()
        yield from done

    def follow(self, frames: Iterator[Opened]) -> Iterator[Opened]:
        """Yield every opened frame of a video, with the mask of its subject if it was found or followed there."""
        photos: list[Opened] = []
        prepared: list[PreparedFrame] = []
        for photo in frames:
            if photo.video_frame is None or self.model is None:
                yield photo  # its rows are known
            elif not self.model.reads(self.phrase(photo.frame)):
                photo.reject = ("phrase_too_long", self.phrase(photo.frame))
                yield photo
            else:
                photos.append(photo)
                prepared.append(photo.video_frame)
                photo.video_frame = None
        models = self.video_sam
        if not photos or models is None:
            return

        def again(number: int) -> PreparedFrame:
            frame = photos[number].frame
            try:
                return models.prepare(self.image(frame), look=True)
            except (DecodeError, FileNotFoundError) as error:
                name = self.roots[frame["source"]].name(frame["path"])
                raise UserError(f"{name} can no longer be read ({error}); run mask again") from None

        video = PreparedVideo(models, prepared, self.phrase(photos[0].frame), again)
        prepared.clear()  # the video releases what it needs no more
        for number, result in track(video, self.params.tracking, self.params.min_detection):
            photos[number].result = result
            yield photos[number]

    def finish(self, photo: Opened) -> Opened:
        """Set the photo's rows (mask or reject, and the agreement) and release its pixels; called by threads."""
        if photo.rows is not None:
            return photo
        frame, quality = photo.frame, self.params.quality
        result = photo.result or MaskResult("grounded_sam")
        cut = None if result.cut is None else clean(result.cut.mask, quality)
        shipped = None if photo.shipped is None else clean(photo.shipped, quality)
        rows: dict[str, dict[str, Any]] = {}
        if photo.reject is not None:
            rows["rejects"] = tables.reject(frame["frame_id"], "mask", *photo.reject)
        elif shipped is not None and self.takes_shipped(frame):
            rows |= self.row(photo, shipped, MaskResult("annotated"))
        elif cut is not None:
            rows |= self.row(photo, cut, result)
        else:
            detail = "nothing found" if result.found is None else f"best score {result.found.score:.3f}"
            lost = "" if result.lost is None else f"tracking lost it, {result.lost}; "
            rows["rejects"] = tables.reject(frame["frame_id"], "mask", "mask_missing", f"{lost}{detail}")
        if shipped is not None and shipped.any() and photo.reject is None and self.compares(frame):
            rows["agreement"] = self.agreement(photo, shipped, cut)
        photo.rows, photo.result, photo.shipped, photo.prepared = rows, None, None, None
        return photo

    def phrase(self, frame: dict[str, Any]) -> str:
        """Return the detector's prompt for this photo."""
        return self.params.phrase.replace("{class}", frame["class_name"])

    def row(self, photo: Opened, mask: np.ndarray, result: MaskResult) -> dict[str, dict[str, Any]]:
        """Return the row of a cleaned mask, or a reject if the mask is empty."""
        frame_id, found = photo.frame["frame_id"], result.found
        if not mask.any():
            return {"rejects": tables.reject(frame_id, "mask", "mask_empty", result.method)}
        area, contact, held = float(mask.mean()), border_contact(mask), mask_box(mask)
        box: Box = held if found is None else found.box
        score = 1.0 if result.presence is None else result.presence
        score = score if found is None else found.score
        mask_score = 1.0 if result.cut is None else result.cut.score
        height, width = mask.shape
        annotated = photo.frame["box"]
        expected = box if annotated is None else [v * s for v, s in zip(annotated, (width, height) * 2, strict=True)]
        agreement = box_iou(held, expected)
        # Annotated boxes have already been counted by curate.
        other = 0.0 if found is None or annotated is not None else found.other / max(found.score, 1e-9)
        flag = quality_flag(area, contact, score * mask_score, agreement, other, self.params.quality)
        row = {
            "frame_id": frame_id,
            "phrase": self.phrase(photo.frame),
            "method": result.method,
            "box": [float(v) for v in box],
            "score": score,
            "height": height,
            "width": width,
            "rle": tables.encode_mask(mask),
            "mask_score": mask_score,
            "area": area,
            "border_contact": contact,
            "quality": flag,
        }
        return {"masks": row}

    def agreement(self, photo: Opened, shipped: np.ndarray, cut: np.ndarray | None) -> dict[str, Any]:
        """Return the row with both masks of a photo and how well they agree."""
        found = cut if cut is not None and cut.any() else None
        detection = None if photo.result is None else photo.result.found
        return {
            "frame_id": photo.frame["frame_id"],
            "class_name": photo.frame["class_name"],
            "height": shipped.shape[0],
            "width": shipped.shape[1],
            "annotated": tables.encode_mask(shipped),
            "found": None if found is None else tables.encode_mask(found),
            "score": None if detection is None else detection.score,
            "iou": None if found is None else iou(shipped, found),
        }
