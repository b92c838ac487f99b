"""Photos of a subject -> rows of frames and rejects: decoded, filtered, captioned."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from PIL import Image
from pydantic import Field, TypeAdapter, field_validator

from pipelines import tables
from pipelines.curate import captions, filters
from pipelines.engine.shards import Rows
from pipelines.photos import licences
from pipelines.photos.decode import DecodeError, decode_image
from pipelines.photos.roots import Roots, SourceParams
from pipelines.photos.videos import Span, VideoParams, choose, frame_path, is_video
from pipelines.sources import Photo, Subject
from pipelines.sources.base import class_noun
from runtime.params import Section

SUBJECT = TypeAdapter(Subject)


class CurateParams(Section):
    """Which photos are kept, and how they are captioned."""

    classes: tuple[str, ...]  # wanted class nouns; empty: all
    licences: tuple[str, ...] | None = Field(min_length=1)  # as `licences.allowed` reads them; null: all
    max_pixels: int = Field(ge=1)
    min_views: int  # frames that a subject with several photos must keep
    captions: captions.CaptionParams
    video: VideoParams
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
        for photo, data in self.opened(subject):
            reason, found = self.examine(subject, photo, hashes, data)
            if reason is not None:
                path = None if is_video(photo.path) else photo.path  # there is no frame to show
                rejects.append(tables.reject(photo.frame_id, "curate", *reason, subject.source, path, photo.box))
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

    def opened(self, subject: Subject) -> Iterator[tuple[Photo, bytes | None]]:
        """Yield each photo of a subject with its content, if that is a frame of a video, which is decoded once.

        The photo then has the frame's path, or the reason why there is none.
        """
        for (path, span), group in groupby(subject.photos, key=lambda photo: (photo.path, whole(photo.span))):
            photos = list(group)
            if span is None or all(self.ruled_out(subject, photo) for photo in photos):
                yield from ((photo, None) for photo in photos)
                continue
            parts = {photo.span.part: photo for photo in photos if photo.span is not None}
            try:
                with self.roots[subject.source].open(path) as stream:
                    for part, found in enumerate(choose(stream, span, self.params.video, self.params.max_pixels)):
                        photo = parts.pop(part)
                        if isinstance(found, DecodeError):
                            yield dropped(photo, found.reason, found.detail), None
                        else:
                            yield replace(photo, path=frame_path(path, found[0])), found[1]
            except FileNotFoundError:
                yield from ((dropped(photo, "missing_file", path), None) for photo in parts.values())

    def ruled_out(self, subject: Subject, photo: Photo) -> filters.Reason | None:
        """Return the reason to drop a photo unread, or None."""
        if photo.reject:
            return photo.reject, photo.reject_detail
        if self.params.classes and subject.class_name not in self.params.classes:
            return "class_not_wanted", subject.class_name
        if self.params.licences is not None and not licences.allowed(photo.licence, self.params.licences):
            return "licence_not_allowed", photo.licence or licences.UNKNOWN
        return filters.first_reason(photo, filters.OF_ANNOTATIONS, self.params.filters)

    def examine(
        self, subject: Subject, photo: Photo, hashes: dict[str, bytes], data: bytes | None = None
    ) -> tuple[filters.Reason | None, tuple[dict[str, Any], bytes] | None]:
        """Return (reason, None) for a photo to drop, (None, (frame row, file content)) for one to keep.

        Args:
            hashes: of the frames that the subject already has.
            data: the content if it has been read.
        """
        limits = self.params.filters
        reason = self.ruled_out(subject, photo)
        if reason is not None:
            return reason, None
        try:
            if data is None:
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
            "role": photo.role,
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
            "licence": photo.licence,
            "attribution": photo.attribution,
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


def dropped(photo: Photo, reason: str, detail: str) -> Photo:
    """Return a photo with a reason to drop it, unless it has one."""
    return photo if photo.reject else replace(photo, reject=reason, reject_detail=detail)


def whole(span: Span | None) -> Span | None:
    """Return the span of which this is a part; the same for all of its parts."""
    return None if span is None else replace(span, part=0)


def spread(subject: Subject, frames: int) -> Subject:
    """Return a subject with `frames` photos, by number, in place of each span."""
    photos: list[Photo] = []
    for photo in subject.photos:
        if photo.span is None or photo.reject is not None:
            photos.append(photo)
            continue
        for part in range(frames):
            span = replace(photo.span, part=part, parts=frames)
            photos.append(replace(photo, frame_id=f"{photo.frame_id}-{part:03d}", span=span))
    return replace(subject, photos=tuple(photos))


def views(subject: Subject) -> int:
    """Return how many photos a subject has; other files beside a single photo do not make it a capture."""
    return sum(photo.reject not in ("not_an_image", "not_a_video") for photo in subject.photos)


def pack(subject: Subject) -> bytes:
    """Return a subject in a tenth of the memory of its objects: the driver holds all subjects of a run."""
    return zlib.compress(SUBJECT.dump_json(subject), 1)


def unpack(payload: bytes) -> Subject:
    """Return the subject that was given to `pack`."""
    return SUBJECT.validate_json(zlib.decompress(payload))
