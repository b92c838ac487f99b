"""Stage: photos of every source -> frames, rejects, triplets, prompts.

`python -m pipelines.curate`
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import TypeAdapter

from params import RunParams, Section, cli, data_dir, load
from pipelines import captions, duplicates, filters, shards, tables, triplets
from pipelines.sources import Photo, Subject, open_source
from pipelines.storage import DecodeError, Root, Roots, SourceParams, decode_image
from stage import digest, digest_files

# What the rows of a photo depend on; duplicates and triplets are found anew in each run.
CODE = (
    *("../stage.py", "archives.py", "captioner.py", "captions.py", "curate.py", "filters.py", "shards.py"),
    *("sources", "storage.py", "tables.py"),
)
_SUBJECT = TypeAdapter(Subject)


class CurateParams(Section):
    """What is kept and how it is paired."""

    classes: tuple[str, ...]  # wanted class nouns, lower case; empty: all
    max_pixels: int
    min_views: int  # a subject photographed more than once must keep so many frames
    captions: captions.CaptionParams
    filters: filters.FilterParams
    triplets: triplets.TripletParams
    shard_subjects: int


class CurateWorker:
    """Decodes the photos of subjects, filters them and captions them."""

    def __init__(self, params: CurateParams, sources: Sequence[SourceParams], device: str = "cpu") -> None:
        self.params = params
        self.roots = Roots(sources)
        self.captioner = None
        if params.captions.captioner is not None:
            from pipelines.captioner import Captioner  # loads torch, which nothing else here needs

            self.captioner = Captioner(params.captions.captioner, device)

    def compute(self, payloads: Sequence[bytes]) -> list[shards.Rows]:
        return [self.curate(unpack(payload)) for payload in payloads]

    def curate(self, subject: Subject) -> shards.Rows:
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
        """Return (reason, None) for a photo to drop, (None, (frame row, its file)) for one to keep."""
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
        """Return the hash of a shipped mask; None where there is none, or none that can be read: mask says so then."""
        if path is None:
            return None
        try:
            return hashlib.sha256(self.roots[source].read(path)).hexdigest()
        except (FileNotFoundError, DecodeError):
            return None

    def caption(self, noun: str, waiting: list[tuple[dict[str, Any], Image.Image]]) -> None:
        """Give the waiting rows captions of the captioner, and let them go."""
        if self.captioner is not None and waiting:
            prompt = captions.template(noun, self.params.captions)
            texts = self.captioner.captions([image for _, image in waiting], prompt)
            for (row, _), text in zip(waiting, texts, strict=True):
                row |= caption_columns(captions.caption(noun, self.params.captions, text, "captioner"))
        waiting.clear()


def caption_columns(caption: captions.Caption) -> dict[str, Any]:
    """Return the columns of the frames table that hold a caption."""
    return {
        "caption": caption.text,
        "caption_origin": caption.origin,
        "noun_start": caption.start,
        "noun_end": caption.end,
    }


@dataclass(frozen=True)
class SubjectItem(shards.Item):
    """A subject, packed.

    Attributes:
        views: how many photos it has before any filter.
    """

    views: int

    def without(self, frame_ids: Collection[str]) -> SubjectItem:
        """Return the subject with these photos rejected unread: they count among its views, as other bad ones do."""
        subject = unpack(self.payload)
        photos = (replace(p, reject="crashed") if p.frame_id in frame_ids else p for p in subject.photos)
        return self.of(self.fingerprint, replace(subject, photos=tuple(photos)))

    @classmethod
    def of(cls, fingerprint: str, subject: Subject) -> SubjectItem:
        """Return the item of a subject."""
        frame_ids = tuple(p.frame_id for p in subject.photos)
        return cls(subject.subject_id, fingerprint, frame_ids, pack(subject), views(subject))


def views(subject: Subject) -> int:
    """Return how many photos a subject has: what lies beside a single one and is none does not make it a capture."""
    return sum(photo.reject != "not_an_image" for photo in subject.photos)


def pack(subject: Subject) -> bytes:
    """Return a subject in a tenth of the memory of its objects: the driver holds all of a run."""
    return zlib.compress(_SUBJECT.dump_json(subject), 1)


def unpack(payload: bytes) -> Subject:
    """Return the subject that `pack` was given."""
    return _SUBJECT.validate_json(zlib.decompress(payload))


def fingerprint(subject: Subject, root: Root) -> str:
    """Return what changes when a photo of the subject or its shipped mask does.

    Size and time of change stand for the bytes, as in rsync: reading every photo to learn that nothing changed would
    cost as much as the stage. It only decides what is computed again, never what comes out.
    """
    files = [path for photo in subject.photos for path in (photo.path, photo.mask_path) if path is not None]
    return digest(_SUBJECT.dump_json(subject).decode(), [state(root, path) for path in files])


def state(root: Root, path: str) -> tuple[int, float] | None:
    """Return size and time of a file; None where there is none."""
    try:
        return root.info(path)
    except FileNotFoundError:
        return None


def items_of(source_params: SourceParams) -> Iterator[SubjectItem]:
    """Yield an item for each subject of a source."""
    root = Root(source_params.root)
    for s in open_source(source_params).subjects():
        yield SubjectItem.of(fingerprint(s, root), s)


def main() -> None:
    params, run = load("curate", CurateParams), load("run", RunParams)
    sources = load("sources", list[SourceParams])
    out, captioner = data_dir() / "curate", params.captions.captioner
    photos: dict[str, int] = {}

    def items() -> Iterator[shards.Item]:
        for source in sources:
            for item in items_of(source):
                photos[item.id] = item.views
                yield item

    weights = []
    if captioner is not None:
        from pipelines.captioner import spec

        weights = [shards.digest_spec(spec(captioner))]
    # What a worker reserves: only the captioner is a model, and no further threads decode for it.
    run = run.model_copy(update={"device": run.torch_device() if captioner else "cpu", "decoders": 0})
    with shards.sole_writer("curate", run, out):
        summary = shards.run_stage(
            "curate",
            items(),
            partial(CurateWorker, params, sources, run.device),
            identity=[
                params.model_dump(exclude={"triplets"}),
                digest_files(*(Path(__file__).parent / name for name in CODE)),
                weights,
            ],
            kept="frames",
            others=[],
            out=out,
            run=run,
            shard_items=params.shard_subjects,
            locked=True,
        )
        duplicates.drop(out, params.filters.duplicate_bits, params.min_views, photos)
        triplets.write(out, params.triplets)
        prompts = [asdict(prompt) for source in sources for prompt in open_source(source).prompts()]
        tables.write(out, "prompts", tables.from_rows("prompts", prompts))
        shards.settle(summary, out, "frames")
        shards.report("curate", summary, out, metrics(out) | {"prompts": len(prompts)})


def metrics(out: Path) -> dict[str, Any]:
    """Return what the stage counts beside photos kept and rejected."""
    frames = tables.read(out, "frames", ["subject_id", "source", "caption_origin"])
    return {
        "subjects": len(frames["subject_id"].unique()),
        "frames_by_source": tables.count_by(frames["source"].to_pylist()),
        "captions": tables.count_by(frames["caption_origin"].to_pylist()),
        "triplets_by_method": tables.count_by(tables.read(out, "triplets", ["method"])["method"].to_pylist()),
    }


if __name__ == "__main__":
    from pipelines import curate  # under its own name: Ray unpickles the worker class by it

    cli(curate.main)
