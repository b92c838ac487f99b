"""Stage: photos of every source -> frames, rejects, triplets, prompts.

`python -m pipelines.curate`
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from params import RunParams, Section, cli, data_dir, load
from pipelines import filters, shards, tables, triplets
from pipelines.sources import Photo, Subject, open_source
from pipelines.storage import DecodeError, Root, Roots, SourceParams, decode_image
from stage import digest, digest_files

CODE = ("../stage.py", "curate.py", "filters.py", "triplets.py", "shards.py", "tables.py", "storage.py", "sources")


class CurateParams(Section):
    """What is kept and how it is paired."""

    classes: tuple[str, ...]  # wanted class nouns, lower case; empty: all
    max_pixels: int
    min_views: int  # a subject photographed more than once must keep so many frames
    caption: str  # for photos without one; {class} is the class noun
    filters: filters.FilterParams
    triplets: triplets.TripletParams
    shard_subjects: int


class CurateWorker:
    """Decodes the photos of subjects, filters them and chooses triplets."""

    def __init__(self, params: CurateParams, sources: Sequence[SourceParams]) -> None:
        self.params = params
        self.roots = Roots(sources)

    def compute(self, payloads: Sequence[Subject]) -> list[shards.Rows]:
        return [self.curate(subject) for subject in payloads]

    def curate(self, subject: Subject) -> shards.Rows:
        """Return the rows of frames, rejects and triplets of one subject."""
        class_name = subject.class_name
        frames: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []
        hashes: dict[str, int] = {}
        wanted = not self.params.classes or class_name in self.params.classes
        for photo in subject.photos:
            reason: filters.Reason | None = ("class_not_wanted", class_name) if not wanted else None
            if photo.reject:
                reason = (photo.reject, photo.reject_detail)
            row = None
            if reason is None:
                reason, row = self.examine(subject, photo, class_name, hashes)
            if reason is not None:
                rejects.append(tables.reject(photo.frame_id, "curate", *reason))
            elif row is not None:
                hashes[photo.frame_id] = row["phash"]
                frames.append(row)
        if len(subject.photos) > 1 and 0 < len(frames) < self.params.min_views:
            detail = f"{len(frames)} of {len(subject.photos)}"
            rejects += [tables.reject(f["frame_id"], "curate", "too_few_views", detail) for f in frames]
            frames = []
        rejects.sort(key=lambda row: tables.path_order(row["id"]))
        pairs: list[dict[str, Any]] = []
        if frames and subject.split == "train":
            views = triplets.viewing_directions(frames)
            pairs = triplets.select(subject.subject_id, class_name, views, self.params.triplets)
        return {"frames": frames, "rejects": rejects, "triplets": pairs}

    def examine(
        self, subject: Subject, photo: Photo, class_name: str, hashes: dict[str, int]
    ) -> tuple[filters.Reason | None, dict[str, Any] | None]:
        """Return (reason, None) for a photo to drop, (None, frame row) for one to keep."""
        limits = self.params.filters
        try:
            data = self.roots[subject.source].read(photo.path)
            image = decode_image(data, self.params.max_pixels)
        except OSError:
            return ("missing_file", photo.path), None
        except DecodeError as error:
            return (error.reason, error.detail), None
        candidate = filters.Candidate(image, photo.box, limits.sharpness_side)
        reason = filters.first_reason(candidate, limits)
        if reason is not None:
            return reason, None
        twin = filters.near_duplicate(candidate.phash, hashes, limits.duplicate_bits)
        if twin is not None:
            return ("near_duplicate", twin), None
        pose = photo.pose
        return None, {
            "frame_id": photo.frame_id,
            "subject_id": subject.subject_id,
            "source": subject.source,
            "class_name": class_name,
            "caption": caption_of(photo.caption, class_name, self.params.caption),
            "split": subject.split,
            "path": photo.path,
            "mask_path": photo.mask_path,
            "box": list(photo.box) if photo.box else None,
            "width": image.width,
            "height": image.height,
            "sha256": hashlib.sha256(data).hexdigest(),
            "phash": candidate.phash,
            "sharpness": candidate.sharpness,
            "rotation": list(pose.rotation) if pose else None,
            "translation": list(pose.translation) if pose else None,
            "focal": list(pose.focal) if pose else None,
            "centre": list(pose.centre) if pose else None,
            "object_centre": list(subject.centre) if subject.centre else None,
        }


def caption_of(caption: str | None, class_name: str, template: str) -> str:
    """Return the caption if it holds the class noun as whole words, else the template's; the pseudo-word follows it."""
    if caption and re.search(rf"(?<!\w){re.escape(class_name)}(?!\w)", caption.lower()):
        return caption.lower()
    return template.replace("{class}", class_name)


def fingerprint(subject: Subject, root: Root) -> str:
    """Return what changes when a photo of the subject does.

    Size and time of change stand for the bytes, as in rsync: reading every photo to learn that nothing changed would
    cost as much as the stage. It only decides what is computed again, never what comes out.
    """
    stats = [root.info(photo.path) if photo.reject != "missing_file" else None for photo in subject.photos]
    return digest(asdict(subject), stats)


def main() -> None:
    params, run = load("curate", CurateParams), load("run", RunParams)
    sources = load("sources", list[SourceParams])
    out = data_dir() / "curate"
    items: list[shards.Item] = []
    prompts: list[dict[str, Any]] = []
    for source_params in sources:
        source = open_source(source_params)
        root = Root(source_params.root)
        for subject in source.subjects():
            frame_ids = tuple(photo.frame_id for photo in subject.photos)
            items.append(shards.Item(subject.subject_id, fingerprint(subject, root), frame_ids, subject))
        for prompt in source.prompts():
            prompts.append(asdict(prompt))
    summary = shards.run_stage(
        "curate",
        items,
        partial(CurateWorker, params, sources),
        identity=[params.model_dump(), digest_files(*(Path(__file__).parent / name for name in CODE))],
        kept="frames",
        others=["triplets"],
        out=out,
        run=run,
        shard_items=params.shard_subjects,
    )
    tables.write(out, "prompts", tables.from_rows("prompts", prompts))
    frames = tables.read(out, "frames", ["subject_id", "source"])
    extra = {
        "subjects": len(set(frames["subject_id"].to_pylist())),
        "frames_by_source": tables.count_by(frames["source"].to_pylist()),
        "triplets_by_method": tables.count_by(tables.read(out, "triplets", ["method"])["method"].to_pylist()),
        "prompts": len(prompts),
    }
    shards.report("curate", summary, out, extra)


if __name__ == "__main__":
    from pipelines import curate  # under its own name: Ray unpickles the worker class by it

    cli(curate.main)
