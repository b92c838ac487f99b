"""Stage: photos of every source -> frames, rejects, prompts."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from model.backbones.identity import spec_digest
from pipelines import tables
from pipelines.curate import STAGE, duplicates
from pipelines.curate.worker import SUBJECT, CurateParams, CurateWorker, pack, spread, unpack, views
from pipelines.engine import driver
from pipelines.engine.items import Item
from pipelines.photos import licences
from pipelines.photos.roots import Root, SourceParams
from pipelines.sources import Subject, open_source
from pipelines.sources.base import CAPTIONS, caption_key, caption_rows, report_other_captions
from runtime.digest import digest
from runtime.errors import UserError
from runtime.params import Params

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SubjectItem(Item):
    """A packed subject.

    Attributes:
        views: number of its photos before any filter.
    """

    views: int

    def without(self, frame_ids: Collection[str]) -> SubjectItem:
        """Return the subject with these photos rejected unread: like other rejected photos, they count as views."""
        subject = unpack(self.payload)
        photos = (replace(p, reject="crashed") if p.frame_id in frame_ids else p for p in subject.photos)
        return self.of(self.fingerprint, replace(subject, photos=tuple(photos)))

    @classmethod
    def of(cls, fingerprint: str, subject: Subject) -> SubjectItem:
        """Return the item of a subject."""
        frame_ids = tuple(p.frame_id for p in subject.photos)
        return cls(subject.subject_id, fingerprint, frame_ids, pack(subject), views(subject))


def fingerprint(subject: Subject, root: Root) -> str:
    """Return a digest that changes when a photo of the subject or its shipped mask changes, or is under another root.

    Size and modification time stand in for the bytes, as in rsync: reading every photo to find that nothing changed
    would cost as much as the stage. The digest only decides what is recomputed, never the result.
    """
    files = [path for photo in subject.photos for path in (photo.path, photo.mask_path) if path is not None]
    states = {path: state(root, path) for path in dict.fromkeys(files)}  # the frames of a video share its file
    return digest(root.place, SUBJECT.dump_json(subject).decode(), [states[path] for path in files])


def state(root: Root, path: str) -> tuple[int, float] | None:
    """Return size and modification time of a file; None if there is none."""
    try:
        return root.info(path)
    except FileNotFoundError:
        return None


def items_of(source_params: SourceParams, video_frames: int) -> Iterator[SubjectItem]:
    """Yield an item for each subject of a source, a video as `video_frames` photos.

    Raises:
        UserError: there is no photo.
    """
    root, photos = Root(source_params.root), 0
    captions = caption_rows(root)
    report_other_captions(root)
    for s in open_source(source_params).subjects():
        photos += len(s.photos)
        for photo in s.photos:
            captions.pop(caption_key(photo.path), None)
        s = spread(s, video_frames)
        yield SubjectItem.of(fingerprint(s, root), s)
    if captions:
        path, (line, _) = next(iter(captions.items()))
        rows = "1 row matches" if len(captions) == 1 else f"{len(captions)} rows match"
        _log.warning(
            "%s: %s no photo: line %d, %s; write paths as below the root", root.name(CAPTIONS), rows, line, path
        )
    if not photos:
        raise UserError(
            f"source '{source_params.name}' ('{root.url}') has no photo where layout {source_params.layout} has them; "
            "put photos there, or correct its root or layout"
        )


def main(params: Params) -> None:
    """Run the stage."""
    curate, run = params.section("curate", CurateParams), params.run
    sources = params.section("sources", list[SourceParams])
    out, captioner = params.data / STAGE.name, curate.captions.captioner
    photos: dict[str, int] = {}

    def items() -> Iterator[Item]:
        for source in sources:
            for item in items_of(source, curate.video.frames):
                photos[item.id] = item.views
                yield item

    weights = []
    if captioner is not None:
        from pipelines.curate.captioner import spec

        weights = [spec_digest(spec(captioner))]
    # Resources a worker reserves: the captioner is the only model, and no extra threads decode for it.
    run = run.model_copy(update={"device": run.torch_device() if captioner else "cpu", "decoders": 0})
    with driver.sole_writer(STAGE.name, run, out):
        summary = driver.run_stage(
            STAGE.name,
            items(),
            partial(CurateWorker, curate, sources, run.device),
            identity=[curate.model_dump(), STAGE.code(), weights],
            kept="frames",
            others=[],
            out=out,
            run=run,
            shard_items=curate.shard_subjects,
        )
        duplicates.drop(out, curate.filters.duplicate_bits, curate.min_views, photos)
        prompts = [asdict(prompt) for source in sources for prompt in open_source(source).prompts()]
        tables.write(out, "prompts", tables.from_rows("prompts", prompts))
        driver.settle(summary, out, "frames")
        counts = licences.by_licence(licences.of_frames(params.data))
        extra = metrics(out) | {"licences": dict(sorted(counts.items())), "prompts": len(prompts)}
        driver.report(STAGE.name, summary, out, extra)
    if warning := licences.warning(counts, run.purpose):
        print(f"{STAGE.name}: {warning}")


def metrics(out: Path) -> dict[str, Any]:
    """Return the stage's counts besides photos kept and rejected."""
    frames = tables.read(out, "frames", ["subject_id", "source", "caption_origin"])
    return {
        "subjects": len(frames["subject_id"].unique()),
        "frames_by_source": tables.count_by(frames["source"].to_pylist()),
        "captions": tables.count_by(frames["caption_origin"].to_pylist()),
    }
