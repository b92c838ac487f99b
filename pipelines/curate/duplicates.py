"""What two subjects share: the same picture (reposts, photos that sets share), or the same object.

The same picture saved again at another size or quality differs in at most 6 of the 256 bits of its hash, photos of
alike subjects in 12 and more (docs/filters.md). The hash is cut into one segment more than bits may differ, so that the
same picture agrees in one of them at least; such candidates are found by sorting, and the time grows with the number of
photos and not with that of pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables

COLUMNS = ("subject_id", "source", "path", "split", "phash")
_BITS = 256  # of a hash
_WORD = 64


def across_subjects(stretches: Iterable[pa.Table], max_bits: int) -> dict[int, int]:
    """Return {row to drop: row of the same picture that stays} for photos of different subjects, rows counted from 0.

    Photos of test subjects stay before those of training subjects, earlier ids before later. Rows that share a file
    (boxes of one photo) are one picture, and go or stay together.

    Args:
        stretches: COLUMNS of the frames table, in key order. Of each picture 45 bytes are held.
    """
    first, subject, words, in_train, rows = _pictures(stretches)
    if max_bits < 0 or not rows:
        return {}
    number, hashes = _different(words)
    pairs = _near(hashes, max_bits)
    shared = np.bincount(number) > 1
    shared[pairs] = True
    near: dict[int, set[int]] = defaultdict(set)
    for a, b in pairs.tolist():
        near[a].add(b)
        near[b].add(a)
    last = np.append(first[1:], rows)
    order = np.lexsort((np.arange(len(first)), in_train))
    kept: dict[int, int] = {}  # by hash, the place in `order` of the first picture that stays
    found: dict[int, int] = {}
    for place in np.flatnonzero(shared[number[order]]).tolist():
        picture = order[place]
        own = int(number[picture])
        # Later ones with the hash of one that stays stay only where they are of its subject: the first stands for all.
        twins = [kept[other] for other in (own, *near.get(own, ())) if other in kept]
        twins = [twin for twin in twins if subject[order[twin]] != subject[picture]]
        if twins:
            stays = int(first[order[min(twins)]])
            found |= dict.fromkeys(range(first[picture], last[picture]), stays)
        else:
            kept.setdefault(own, place)
    return found


def drop(folder: Path, max_bits: int, min_views: int, photos: Mapping[str, int]) -> None:
    """Move the duplicates in `folder` from the frames table to the rejects table, and with them the rest of a subject
    of which fewer than `min_views` frames are left.

    Args:
        photos: by subject_id, how many it had before any filter, without files that are none; a subject of one photo
            needs one.
    """
    twins = across_subjects(tables.stream(folder, "frames", COLUMNS), max_bits)
    if not twins:
        return
    ids = _ids(folder, {*twins, *twins.values()})
    dropped = {ids[goes]: ("duplicate", ids[stays]) for goes, stays in twins.items()}
    left: dict[str, list[str]] = {frame_id.rpartition("/")[0]: [] for frame_id in dropped}
    hit = pa.array(left, pa.string())
    for stretch in tables.stream(folder, "frames", ["frame_id", "subject_id"]):
        for row in stretch.filter(pc.is_in(stretch["subject_id"], hit)).to_pylist():
            if row["frame_id"] not in dropped:
                left[row["subject_id"]].append(row["frame_id"])
    for subject, rest in left.items():
        if photos[subject] > 1 and 0 < len(rest) < min_views:
            dropped |= {frame_id: ("too_few_views", f"{len(rest)} of {photos[subject]}") for frame_id in rest}
    tables.move_to_rejects(folder, "frames", "frame_id", dropped, "curate")


def _pictures(stretches: Iterable[pa.Table]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Return of each picture its first row [n], its subject's number [n] int32, its hash [n, 4] uint64 and whether it
    is for training [n] bool; and the number of rows."""
    parts: list[tuple[np.ndarray, ...]] = [
        (np.empty(0, np.int64), np.empty(0, np.int32), np.empty((0, 4), np.uint64), np.empty(0, bool))
    ]
    before: pa.Table | None = None
    rows = subjects = 0
    for stretch in stretches:
        if not len(stretch):
            continue
        seen = stretch if before is None else pa.concat_tables([before, stretch])
        known = len(seen) - len(stretch)
        # Rows of one file follow each other.
        picture = (tables.changes(seen["source"]) | tables.changes(seen["path"]))[known:]
        subject = subjects + np.cumsum(tables.changes(seen["subject_id"])[known:])
        first = np.flatnonzero(picture)
        in_train = pc.not_equal(stretch["split"], "test").to_numpy()[first]
        parts.append((rows + first, subject[first].astype(np.int32), _words(stretch["phash"])[first], in_train))
        rows, subjects, before = rows + len(stretch), int(subject[-1]), stretch[-1:]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return columns[0], columns[1], columns[2], columns[3], rows


def _ids(folder: Path, rows: Collection[int]) -> dict[int, str]:
    """Return the frame_ids of some rows of the frames table."""
    wanted, found, start = np.array(sorted(rows)), dict[int, str](), 0
    for stretch in tables.stream(folder, "frames", ["frame_id"]):
        here = wanted[(wanted >= start) & (wanted < start + len(stretch))]
        found |= zip(here.tolist(), stretch["frame_id"].take(pa.array(here - start)).to_pylist(), strict=True)
        start += len(stretch)
    return found


def _words(column: pa.ChunkedArray) -> np.ndarray:
    """Return the hashes as [rows, 4] uint64."""
    whole = pa.concat_arrays(column.chunks)
    data = np.frombuffer(whole.buffers()[1], dtype=">u8").reshape(-1, 4)
    return data[whole.offset : whole.offset + len(whole)].astype(np.uint64)


def _different(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return of each picture the number of its hash [n], and the different hashes [m, 4]."""
    order = np.lexsort(words.T)
    ordered = words[order]
    new = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(new) - 1
    return number, ordered[new]


def _near(hashes: np.ndarray, max_bits: int) -> np.ndarray:
    """Return pairs [n, 2] of the hashes that differ in at most `max_bits` bits; some more than once.

    Sorted by a segment, those that agree in it are neighbours: each is compared with the next one, the one after it,
    and so on, as long as the segment is the same.
    """
    segments = min(max(max_bits + 1, _BITS // _WORD), _BITS)
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for start, end in pairwise(number * _BITS // segments for number in range(segments + 1)):
        values = _segment(hashes, start, end)
        order = np.argsort(values)
        values = values[order]
        at, lag = np.arange(len(order) - 1), 1
        while len(at := at[values[at] == values[at + lag]]):
            a, b = order[at], order[at + lag]
            bits = np.bitwise_count(hashes[a] ^ hashes[b]).sum(axis=1)
            pairs.append(np.stack([a, b], axis=1)[bits <= max_bits])
            lag += 1
            at = at[at + lag < len(order)]
    return np.concatenate(pairs)


def _segment(hashes: np.ndarray, start: int, end: int) -> np.ndarray:
    """Return bits `start` to `end` of each hash, 64 at most, as uint64 [n]."""
    word, offset = divmod(start, _WORD)
    bits = hashes[:, word] << np.uint64(offset)
    if offset + end - start > _WORD:
        bits |= hashes[:, word + 1] >> np.uint64(_WORD - offset)
    return bits >> np.uint64(_WORD - (end - start))
