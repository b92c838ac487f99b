"""Items, a stage's units of work: cut into shards, and spooled to disk while the stage runs."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from pipelines import tables
from runtime.digest import digest


@dataclass(frozen=True)
class Item:
    """The unit of work: given to a worker as a whole, and never computed twice.

    Attributes:
        id: path-like; items are processed and stored in this order.
        fingerprint: changes when any input byte that the result depends on changes.
        frame_ids: the photos accounted for by this item.
        payload: the worker's input, picklable; one row with `frame_id` per photo, unless a subclass overrides
            `without`.
    """

    id: str
    fingerprint: str
    frame_ids: tuple[str, ...]
    payload: Any

    def without(self, frame_ids: Collection[str]) -> Item:
        """Return the item without photos that kill a worker.

        A subclass may keep them in `frame_ids` and have the worker reject them unread.
        """
        left = [row for row in self.payload if row["frame_id"] not in frame_ids]
        return replace(self, frame_ids=tuple(i for i in self.frame_ids if i not in frame_ids), payload=left)


class Key(NamedTuple):
    """What the driver keeps of an item in memory."""

    id: str
    fingerprint: str
    photos: int
    place: int


class Spool:
    """The items of a run in an unnamed file: payloads of millions of photos do not fit in the driver's memory.

    keys: of all items, sorted by id. The file is deleted with the spool.
    """

    def __init__(self, items: Iterable[Item], folder: Path) -> None:
        self.file = tempfile.TemporaryFile(dir=folder, buffering=2**20)  # noqa: SIM115
        self.keys: list[Key] = []
        for item in items:
            self.keys.append(Key(item.id, item.fingerprint, len(item.frame_ids), self.file.tell()))
            pickle.dump(item, self.file, protocol=pickle.HIGHEST_PROTOCOL)
        self.keys.sort(key=lambda key: tables.path_order(key.id))

    def read(self, key: Key) -> Item:
        """Return the item of a key."""
        self.file.seek(key.place)
        item: Item = pickle.load(self.file)
        return item


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_HasId)


def cut(items: Sequence[T], mean: int) -> list[list[T]]:
    """Cut sorted items into shards of `mean` items on average, at most 4 x `mean`.

    The hash of an item's id decides whether a shard ends with it, so that a new item changes one shard and leaves all
    others as they are (content-defined chunking, as in backup programs).
    """
    shards: list[list[T]] = [[]]
    for item in items:
        shards[-1].append(item)
        ends_here = int(digest(item.id), 16) % mean == 0
        if ends_here or len(shards[-1]) == 4 * mean:
            shards.append([])
    return [shard for shard in shards if shard]
