"""Photos of a subject -> rows of frames and rejects: decoded, filtered, captioned."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import Any

from PIL import Image
from pydantic import Field, TypeAdapter, field_validator

from pipelines import tables
from pipelines.curate import captions, filters
from pipelines.engine.shards import Rows
from pipelines.photos.decode import DecodeError, decode_image
from pipelines.photos.roots import Roots, SourceParams
from pipelines.sources import Photo, Subject
from pipelines.sources.base import class_noun
from runtime.params import Section

SUBJECT = TypeAdapter(Subject)


class CurateParams(Section):
    """Which photos are kept, and how they are captioned."""

    classes: tuple[str, ...]  # wanted class nouns; empty: all
    max_pixels: int = Field(ge=1)
    min_views: int  # frames that a subject with several photos must keep
    captions: captions.CaptionParams
    filters: filters.FilterParams
    shard_subjects: int = Field(ge=1)

    @field_validator("classes")
    @classmethod
    def classes_are_nouns(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        """Compare as class nouns do, whose case and underscores the sources normalise."""
        return tuple(class_noun(name) for name in classes)


class CurateWorker:
    """Decodes the photos of subjects, filters them and captions them."""

    def __init__(self, params: CurateParams, sources: Sequence[SourceParams], device: str = "cpu") -> None:
        self.params = params
        self.roots = Roots(sources)
        self.captioner = None
        if params.captions.captioner is not None:
            from pipelines.curate.captioner import Captioner  # imports torch, which nothing else here needs

            self.captioner = Captioner(params.captions.captioner, device)

    def compute(self, payloads: Sequence[bytes]) -> list[Rows]:
        return [self.curate(unpack(payload)) for payload in payloads]

    def curate(self, subject: Subject) -> Rows:
        """Return the rows of frames and rejects of one subject."""
        frames: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []
        hashes: dict[str, bytes] = {}
        waiting: list[tuple[dict[str, Any], Image.Image]] = []
        for photo in subject.photos:
            reason, found = self.examine(subject, photo, hashes)
            if reason is not None:
                rejects.append(tables.reject(photo.frame_id, "curate", *reason, subject.source, photo.path, photo.box))
            elif found is not None:
                row, data = found
                hashes[photo.frame_id] = row["phash"]
                frames.append(row)
                if self.captioner is not None and not photo.caption:
                    waiting.append((row, decode_image(data, self.params.max_pixels)))
                    if len(waiting) == self.captioner.params.batch_size:
                        self.caption(subject.class_name, waiting)
        self.caption(subject.class_name, waiting)
        taken = views(subject)
        if taken > 1 and 0 < len(frames) < self.params.min_views:
            detail = f"{len(frames)} of {taken}"
            for row in frames:
                of = (subject.source, row["path"], row["box"])
                rejects.append(tables.reject(row["frame_id"], "curate", "too_few_views", detail, *of))
            frames = []
        rejects.sort(key=lambda row: tables.path_order(row["id"]))
        return {"frames": frames, "rejects": rejects}

    def examine(
        self, subject: Subject, photo: Photo, hashes: dict[str, bytes]
    ) -> tuple[filters.Reason | None, tuple[dict[str, Any], bytes] | None]:
        """Return (reason, None) for a photo to drop, (None, (frame row, file content)) for one to keep."""
        limits, wanted = self.params.filters, self.params.classes
        if photo.reject:
            return (photo.reject, photo.reject_detail), None
        if wanted and subject.class_name not in wanted:
            return ("class_not_wanted", subject.class_name), None
        reason = filters.first_reason(photo, filters.OF_ANNOTATIONS, limits)
        if reason is not None:
            return reason, None
        try:
            data = self.roots[subject.source].read(photo.path)
            candidate = filters.candidate(data, self.params.max_pixels, limits)
        except FileNotFoundError:
            return ("missing_file", photo.path), None
        except DecodeError as error:
            return (error.reason, error.detail), None
        reason = filters.first_reason(candidate, filters.OF_PIXELS, limits)
        if reason is not None:
            return reason, None
        twin = filters.near_duplicate(candidate.phash, hashes, limits.duplicate_bits)
        if twin is not None:
            return ("near_duplicate", twin), None
        pose = photo.pose
        caption = captions.caption(subject.class_name, self.params.captions, photo.caption)
        row = {
            "frame_id": photo.frame_id,
            "subject_id": subject.subject_id,
            "source": subject.source,
            "class_name": subject.class_name,
            **caption_columns(caption),
            "split": subject.split,
            "path": photo.path,
            "mask_path": photo.mask_path,
            "mask_sha256": self.mask_sha256(subject.source, photo.mask_path),
            "box": list(photo.box) if photo.box else None,
            "width": candidate.size[0],
            "height": candidate.size[1],
            "sha256": hashlib.sha256(data).hexdigest(),
            "phash": candidate.phash,
            "sharpness": candidate.sharpness,
            "rotation": list(pose.rotation) if pose else None,
            "translation": list(pose.translation) if pose else None,
            "focal": list(pose.focal) if pose else None,
            "centre": list(pose.centre) if pose else None,
            "object_centre": list(subject.centre) if subject.centre else None,
        }
        return None, (row, data)

    def mask_sha256(self, source: str, path: str | None) -> str | None:
        """Return the hash of a shipped mask; None if there is none or it is unreadable, as the mask stage reports."""
        if path is None:
            return None
        try:
            return hashlib.sha256(self.roots[source].read(path)).hexdigest()
        except (FileNotFoundError, DecodeError):
            return None

    def caption(self, noun: str, waiting: list[tuple[dict[str, Any], Image.Image]]) -> None:
        """Add the captioner's captions to the waiting rows, and clear the list."""
        if self.captioner is not None and waiting:
            prompt = captions.template(noun, self.params.captions)
            texts = self.captioner.captions([image for _, image in waiting], prompt)
            for (row, _), text in zip(waiting, texts, strict=True):
                row |= caption_columns(captions.caption(noun, self.params.captions, text, "captioner"))
        waiting.clear()


def caption_columns(caption: captions.Caption) -> dict[str, Any]:
    """Return a caption as columns of the frames table."""
    return {
        "caption": caption.text,
        "caption_origin": caption.origin,
        "noun_start": caption.start,
        "noun_end": caption.end,
    }


def views(subject: Subject) -> int:
    """Return how many photos a subject has; other files beside a single photo do not make it a capture."""
    return sum(photo.reject != "not_an_image" for photo in subject.photos)


def pack(subject: Subject) -> bytes:
    """Return a subject in a tenth of the memory of its objects: the driver holds all subjects of a run."""
    return zlib.compress(SUBJECT.dump_json(subject), 1)


def unpack(payload: bytes) -> Subject:
    """Return the subject that was given to `pack`."""
    return SUBJECT.validate_json(zlib.decompress(payload))
