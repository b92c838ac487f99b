"""Shards: runs of items that are computed together, and their rows on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, NamedTuple

import pyarrow as pa

from pipelines import tables
from pipelines.engine.items import Key
from pipelines.engine.work import RECORD, WorkFolder
from runtime.digest import digest

READERS = 16
"""Threads that read small files of an object store; each read mostly waits for the network."""

Rows = dict[str, list[dict[str, Any]]]
Stored = dict[str, pa.Table]  # an item's rows of each table, as stored in a shard


def bounded(keys: Sequence[Key], photos: int | None) -> list[list[Key]]:
    """Split a shard's items into pieces of at most `photos` photos; an item is never split, however large."""
    pieces: list[list[Key]] = [[]]
    held = 0
    for key in keys:
        if photos is not None and pieces[-1] and held + key.photos > photos:
            pieces.append([])
            held = 0
        pieces[-1].append(key)
        held += key.photos
    return pieces


class Shard:
    """A run of items, named by their ids and fingerprints."""

    def __init__(self, keys: tuple[Key, ...], names: tuple[str, ...]) -> None:
        self.keys, self.names = keys, names
        self.name = digest([(key.id, key.fingerprint) for key in keys])

    def save(self, work: WorkFolder, results: Sequence[Rows | Stored]) -> None:
        """Write the tables and each item's row counts; the shard exists only once all of it is written."""
        counts = []
        for key, result in zip(self.keys, results, strict=True):
            counts.append([key.id, key.fingerprint, [len(result.get(name, [])) for name in self.names]])
        with work.writing(self.name) as folder:
            for name in self.names:
                in_order = [_as_table(name, result.get(name, [])) for result in results]
                tables.write_part(folder / f"{name}.parquet", name, pa.concat_tables(in_order))
            with (folder / RECORD).open("w", encoding="utf-8") as stream:
                json.dump({"tables": self.names, "items": counts}, stream)
                stream.flush()
                os.fsync(stream.fileno())


def _as_table(name: str, rows: pa.Table | Sequence[dict[str, Any]]) -> pa.Table:
    """Return an item's rows as a table; rows read from a shard are already sorted."""
    return rows.cast(tables.spec(name).schema) if isinstance(rows, pa.Table) else tables.from_rows(name, rows)


class Place(NamedTuple):
    """Location of an item's rows."""

    shard: str
    position: int  # of the item in the shard


class Index:
    """Locations of items in the shards of earlier runs, so that a shard that has grown computes only its new items.

    The driver holds the locations and the worker reads the rows: those of one item may take gigabytes.
    """

    def __init__(self, work: WorkFolder, earlier: Iterable[str]) -> None:
        self.place: dict[tuple[str, str], Place] = {}
        names = sorted(earlier)
        with ThreadPoolExecutor(READERS) as pool:
            for name, record in zip(names, pool.map(work.record, names), strict=True):
                for position, (item_id, fingerprint, _) in enumerate(record["items"]):
                    self.place[item_id, fingerprint] = Place(name, position)

    def __contains__(self, key: Key) -> bool:
        return (key.id, key.fingerprint) in self.place

    def places(self, keys: Iterable[Key]) -> dict[str, Place]:
        """Return {item id: place} of the items in the index."""
        return {key.id: self.place[key.id, key.fingerprint] for key in keys if key in self}


def stored_rows(work: WorkFolder, places: Mapping[str, Place]) -> dict[str, Stored]:
    """Return {item id: rows} of items in finished shards. Each shard is read once."""
    found: dict[str, Stored] = {item_id: {} for item_id in places}
    for shard in sorted({place.shard for place in places.values()}):
        record = work.record(shard)
        for column, name in enumerate(record["tables"]):
            table = work.table(shard, name)
            counts = [entry[2][column] for entry in record["items"]]
            starts = [0, *accumulate(counts)]
            for item_id, (where, position) in places.items():
                if where == shard:
                    found[item_id][name] = table.slice(starts[position], counts[position])
    return found
