"""Which pairs an export holds, and in which shard: a streaming join of triplets, frames and masks."""

from __future__ import annotations

import hashlib
import heapq
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from pipelines import tables
from pipelines.engine import subjects
from pipelines.engine.items import Item
from pipelines.export.options import ExportOptions
from runtime.digest import digest
from runtime.errors import UserError

SPLITS = ("train", "validation")
FRAME_COLUMNS = ("source", "path", "class_name", "caption", "sharpness", "licence", "attribution")
MASK_COLUMNS = ("frame_id", "height", "width", "rle", "score", "mask_score", "quality")
LEFT_OUT = {
    "one_photo": "reference and target are one photo, which teaches copying",
    "no_third_view": "the subject has no third photo for a second reference",
    "repeated": "the same photos are a pair already",
    "per_subject": "the subject has --per-subject pairs already",
}
"""Why a triplet makes no pair of the export."""
EXAMPLES = 8
"""Pairs on the sheet of examples: what fits a screen."""


@dataclass(frozen=True)
class Part:
    """A shard of an export: pairs that are computed together, in one file or a run of files.

    Attributes:
        split: of SPLITS.
        index: of the shard in its split.
        pairs: each with `number` in the split, `triplet`, and the frame rows, masks under `extra`, by role.
    """

    split: str
    index: int
    pairs: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        """`train-000012`."""
        return f"{self.split}-{self.index:06d}"


class PartItem(Item):
    """A shard as an item of the engine; what it accounts for are its triplets."""

    def without(self, frame_ids: Collection[str]) -> Item:
        left = tuple(pair for pair in self.payload.pairs if pair["triplet"]["triplet_id"] not in frame_ids)
        ids = tuple(pair["triplet"]["triplet_id"] for pair in left)
        return replace(self, frame_ids=ids, payload=replace(self.payload, pairs=left))


def read(data: Path, options: ExportOptions, left_out: Counter[str] | None = None) -> Iterator[Item]:
    """Yield the shards of an export of the tables in `data`; `plan` describes them.

    Raises:
        UserError: the tables do not fit each other.
    """
    masks = ((row["frame_id"], row) for row in tables.rows(data / "mask", "masks", MASK_COLUMNS))
    good = ((frame_id, row) for frame_id, row in masks if row["quality"] == "ok")
    triplets = tables.rows(data / "pairs", "triplets")
    return plan(triplets, subjects.items(data / "curate", FRAME_COLUMNS, good), options, left_out)


def plan(
    triplets: Iterable[dict[str, Any]],
    photos: Iterable[Item],
    options: ExportOptions,
    left_out: Counter[str] | None = None,
) -> Iterator[Item]:
    """Yield the shards of an export, holding the rows of one subject and of one unfinished shard a split.

    A split's pairs are numbered in the order of the triplets table. Whole subjects are in one split, which the hash of
    their id decides.

    Args:
        triplets: rows of the triplets table, in its order.
        photos: subjects with their frame rows, masks under `extra`, in the same order; `subjects.items` gives them.
        left_out: updated with the number of triplets that make no pair, by reason of LEFT_OUT.

    Raises:
        UserError: a triplet names a frame that `photos` lacks.
    """
    held: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    shards = Counter[str]()
    counted = Counter[str]()
    counter = Counter[str]() if left_out is None else left_out

    def shard(split: str) -> Item:
        part = Part(split, shards[split], tuple(held[split]))
        shards[split] += 1
        held[split] = []
        ids = tuple(pair["triplet"]["triplet_id"] for pair in part.pairs)
        return PartItem(f"{split}/{part.index:06d}", digest(split, part.index, part.pairs), ids, part)

    waiting = iter(photos)
    for subject_id, group in groupby(triplets, key=lambda row: row["subject_id"]):
        frames = _frames(waiting, subject_id)
        split = split_of(subject_id, options.validation)
        for triplet in chosen(group, options, counter):
            pair = {"number": counted[split], "triplet": triplet}
            for role in options.roles():
                if triplet[role] not in frames:
                    raise UserError(
                        f"triplet {triplet['triplet_id']} names the frame {triplet[role]}, which has no row in the"
                        " tables of curate or no good mask in that of mask; run pairs again"
                    )
                pair[role] = frames[triplet[role]]
            counted[split] += 1
            held[split].append(pair)
            if len(held[split]) == options.part:
                yield shard(split)
    yield from (shard(split) for split in SPLITS if held[split])


def chosen(
    triplets: Iterable[dict[str, Any]], options: ExportOptions, left_out: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield the triplets of a subject that make a pair; count the others by reason."""
    seen: set[tuple[str, ...]] = set()
    for triplet in triplets:
        views = tuple(triplet[role] for role in options.roles())
        if triplet["reference"] == triplet["target"]:
            left_out["one_photo"] += 1
        elif len(set(views)) < len(views):
            left_out["no_third_view"] += 1
        elif views in seen:
            left_out["repeated"] += 1
        elif len(seen) == options.per_subject:
            left_out["per_subject"] += 1
        else:
            seen.add(views)
            yield triplet


def split_of(subject_id: str, validation: float) -> str:
    """Return the split of a subject, which depends on its id alone, not on other subjects."""
    return SPLITS[zlib.crc32(subject_id.encode()) / 2**32 < validation]


@dataclass
class Survey:
    """Totals of a plan, from one pass over it.

    Attributes:
        digest: 16 hex digits that change with anything in the plan.
        pairs, subjects: numbers by split.
        parts: shards of all splits.
        left_out: triplets that make no pair, by reason.
        examples: pairs for the sheet, spread over the subjects by the hash of their id.
    """

    digest: str = ""
    pairs: Counter[str] = field(default_factory=Counter)
    subjects: Counter[str] = field(default_factory=Counter)
    parts: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, items: Iterable[Item], left_out: Counter[str]) -> Survey:
        """Return the totals of a plan; `left_out` is the counter that the plan updates."""
        found, state = cls(left_out=left_out), hashlib.blake2b(digest_size=8)
        last: dict[str, str] = {}
        drawn: list[tuple[str, int, dict[str, Any]]] = []  # a heap of one pair of each of the subjects drawn
        for item in items:
            part: Part = item.payload
            state.update(f"{item.id} {item.fingerprint}\n".encode())
            found.parts += 1
            found.pairs[part.split] += len(part.pairs)
            for pair in part.pairs:
                subject_id = pair["triplet"]["subject_id"]
                if last.get(part.split) != subject_id:
                    last[part.split] = subject_id
                    found.subjects[part.split] += 1
                    heapq.heappush(drawn, (digest(subject_id), -sum(found.subjects.values()), pair))
                    if len(drawn) > EXAMPLES:
                        heapq.heappop(drawn)
        found.digest = state.hexdigest()
        found.examples = [pair for _, _, pair in sorted(drawn, key=lambda entry: -entry[1])]
        return found


def _frames(waiting: Iterator[Item], subject_id: str) -> dict[str, dict[str, Any]]:
    """Return the frame rows of a subject by id, from subjects in the order in which they are asked for.

    Raises:
        UserError: there is no such subject.
    """
    wanted = tables.path_order(subject_id)
    found = next((item for item in waiting if tables.path_order(item.id) >= wanted), None)
    if found is None or found.id != subject_id:
        raise UserError(
            f"the triplets of {subject_id} name frames without a row in the tables of curate or a good mask in those of"
            " mask; run pairs again"
        )
    return {row["frame_id"]: row for row in found.payload}
