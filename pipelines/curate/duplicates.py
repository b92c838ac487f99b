"""Duplicates across subjects: the same image in photos of different subjects (reposts, photos shared by sets).

The same image saved again at another size or quality differs in at most 6 of the 256 bits of its hash, photos of
similar subjects in 12 or more (docs/filters.md). The hash is split into one more segment than bits may differ, so that
hashes of the same image agree in at least one of them. These candidates are found by sorting, and the time grows with
the number of photos, not of pairs.
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


def across_subjects(chunks: Iterable[pa.Table], max_bits: int) -> dict[int, int]:
    """Return {row to drop: kept row of the same image} for photos of different subjects, rows counted from 0.

    Test subjects take precedence over training subjects, earlier ids over later. Rows that share a file (boxes of one
    photo) are one image, and are kept or dropped together.

    Args:
        chunks: COLUMNS of the frames table, in key order. 45 bytes are held per image.
    """
    first, subject, words, in_train, rows = _images(chunks)
    if max_bits < 0 or not rows:
        return {}
    number, hashes = _distinct(words)
    pairs = _near(hashes, max_bits)
    shared = np.bincount(number) > 1
    shared[pairs] = True
    near: dict[int, set[int]] = defaultdict(set)
    for a, b in pairs.tolist():
        near[a].add(b)
        near[b].add(a)
    last = np.append(first[1:], rows)
    order = np.lexsort((np.arange(len(first)), in_train))
    kept: dict[int, int] = {}  # by hash, the position in `order` of the first kept image
    found: dict[int, int] = {}
    for place in np.flatnonzero(shared[number[order]]).tolist():
        image = order[place]
        own = int(number[image])
        # An image with a kept image's hash is kept only if it is of the same subject: the first stands for all.
        matches = [kept[other] for other in (own, *near.get(own, ())) if other in kept]
        matches = [match for match in matches if subject[order[match]] != subject[image]]
        if matches:
            kept_row = int(first[order[min(matches)]])
            found |= dict.fromkeys(range(first[image], last[image]), kept_row)
        else:
            kept.setdefault(own, place)
    return found


def drop(folder: Path, max_bits: int, min_views: int, photos: Mapping[str, int]) -> None:
    """Move the duplicates in `folder` from the frames table to the rejects table, with the remaining frames of subjects
    that are left with fewer than `min_views`.

    Args:
        photos: by subject_id, the number of photos before any filter, without files that are not images; a subject of
            one photo needs one.
    """
    matches = across_subjects(tables.stream(folder, "frames", COLUMNS), max_bits)
    if not matches:
        return
    ids = _ids(folder, {*matches, *matches.values()})
    dropped = {ids[row]: ("duplicate", ids[kept_row]) for row, kept_row in matches.items()}
    left: dict[str, list[str]] = {frame_id.rpartition("/")[0]: [] for frame_id in dropped}
    hit = pa.array(left, pa.string())
    for chunk in tables.stream(folder, "frames", ["frame_id", "subject_id"]):
        for row in chunk.filter(pc.is_in(chunk["subject_id"], hit)).to_pylist():
            if row["frame_id"] not in dropped:
                left[row["subject_id"]].append(row["frame_id"])
    for subject, rest in left.items():
        if photos[subject] > 1 and 0 < len(rest) < min_views:
            dropped |= {frame_id: ("too_few_views", f"{len(rest)} of {photos[subject]}") for frame_id in rest}
    tables.move_to_rejects(folder, "frames", "frame_id", dropped, "curate")


def _images(chunks: Iterable[pa.Table]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Return, for each image, its first row [n], its subject's number [n] int32, its hash [n, 4] uint64 and whether it
    is for training [n] bool; and the number of rows."""
    parts: list[tuple[np.ndarray, ...]] = [
        (np.empty(0, np.int64), np.empty(0, np.int32), np.empty((0, 4), np.uint64), np.empty(0, bool))
    ]
    before: pa.Table | None = None
    rows = subjects = 0
    for chunk in chunks:
        if not len(chunk):
            continue
        seen = chunk if before is None else pa.concat_tables([before, chunk])
        known = len(seen) - len(chunk)
        # Rows of one file are adjacent.
        new = (tables.changes(seen["source"]) | tables.changes(seen["path"]))[known:]
        subject = subjects + np.cumsum(tables.changes(seen["subject_id"])[known:])
        first = np.flatnonzero(new)
        in_train = pc.not_equal(chunk["split"], "test").to_numpy()[first]
        parts.append((rows + first, subject[first].astype(np.int32), _words(chunk["phash"])[first], in_train))
        rows, subjects, before = rows + len(chunk), int(subject[-1]), chunk[-1:]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return columns[0], columns[1], columns[2], columns[3], rows


def _ids(folder: Path, rows: Collection[int]) -> dict[int, str]:
    """Return the frame_ids of some rows of the frames table."""
    wanted, found, start = np.array(sorted(rows)), dict[int, str](), 0
    for chunk in tables.stream(folder, "frames", ["frame_id"]):
        here = wanted[(wanted >= start) & (wanted < start + len(chunk))]
        found |= zip(here.tolist(), chunk["frame_id"].take(pa.array(here - start)).to_pylist(), strict=True)
        start += len(chunk)
    return found


def _words(column: pa.ChunkedArray) -> np.ndarray:
    """Return the hashes as [rows, 4] uint64."""
    whole = pa.concat_arrays(column.chunks)
    data = np.frombuffer(whole.buffers()[1], dtype=">u8").reshape(-1, 4)
    return data[whole.offset : whole.offset + len(whole)].astype(np.uint64)


def _distinct(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each image's hash [n], and the distinct hashes [m, 4]."""
    order = np.lexsort(words.T)
    ordered = words[order]
    new = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(new) - 1
    return number, ordered[new]


def _near(hashes: np.ndarray, max_bits: int) -> np.ndarray:
    """Return pairs [n, 2] of the hashes that differ in at most `max_bits` bits; some more than once.

    Sorted by a segment, hashes that agree in it are adjacent: each is compared with the next one, the one after it, and
    so on, as long as the segment is the same.
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
    """Return bits `start` to `end` of each hash, at most 64, as uint64 [n]."""
    word, offset = divmod(start, _WORD)
    bits = hashes[:, word] << np.uint64(offset)
    if offset + end - start > _WORD:
        bits |= hashes[:, word + 1] >> np.uint64(_WORD - offset)
    return bits >> np.uint64(_WORD - (end - start))
