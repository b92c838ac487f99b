"""Choice of three frames of a subject for a sample: reference (input), positive (other view), target (reconstructed).

All computation is on columns, for all subjects of a chunk of the frames table at once: 220,000 subjects are too many
for a Python object each. Nothing depends on how the table is split into chunks.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipelines import tables
from pipelines.photos import poses
from runtime.params import Band, Section

COLUMNS = ("frame_id", "subject_id", "class_name", "role", *poses.POSE_COLUMNS)

# Steps of the two-dimensional additive sequence with the most even gaps (Roberts 2018, "R2"), from the plastic number.
_STEPS = (0.7548776662466927, 0.5698402909980532)
# Numbers per computation: distances [subjects, samples, frames], 8 bytes each.
_CELLS = 2**20
# Costs above all distances (180): a frame outside the band is chosen before one that is not allowed.
_OUTSIDE, _REPEATED, _ITSELF = 1e3, 1e6, 1e9
# Decimals of degrees or fractions: distances that differ by less are equal, and ties are broken at random.
_GRAIN = 4


class TripletParams(Section):
    """How triplets are chosen."""

    per_subject: int = Field(ge=1, le=1000)
    class_balance: float = Field(gt=0)  # maximum triplets of a class, as a multiple of the mean class's
    angle_band: Band  # degrees between viewing directions, reference to the other two
    order_band: Band  # the same without poses, as a fraction of the capture's length
    seed: int


def write(frames: Callable[[], Iterator[pa.Table]], out: Path, params: TripletParams) -> None:
    """Write the triplets table to `out`, in memory that does not grow with the frames.

    Args:
        frames: returns the usable frames, COLUMNS in key order, in chunks of any length; called twice.
    """
    subjects = _subjects(frames())
    counts = per_subject(subjects["class"].to_numpy(), _keys(subjects["id"], params.seed), params)
    del subjects

    def pieces() -> Iterator[pa.Table]:
        done = 0
        for chunk in with_both_roles(whole_subjects(frames())):
            number = int(tables.changes(chunk["subject_id"]).sum())
            yield select(chunk, counts[done : done + number], params)
            done += number

    tables.write_parts(out, "triplets", pieces())


def per_subject(classes: np.ndarray, keys: np.ndarray, params: TripletParams) -> np.ndarray:
    """Return the number of triplets of each subject [S]: `per_subject`, fewer in a class that is too large.

    A class has at most `class_balance` times as many as the mean class would with `per_subject` each, divided among its
    subjects as evenly as possible; every subject gets at least one.

    Args:
        classes: number of each subject's class [S]. keys: from `_keys` [S]; they decide who gets one more than others.
    """
    if not len(classes):
        return np.empty(0, dtype=np.int64)
    sizes = np.bincount(classes)
    most = int(params.class_balance * params.per_subject * len(classes) / np.count_nonzero(sizes))
    share = np.maximum(most // np.maximum(sizes, 1), 1)
    more = np.maximum(most - share * sizes, 0)
    order = np.lexsort((keys, classes))
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rank = np.empty(len(classes), dtype=np.int64)
    rank[order] = np.arange(len(classes)) - first[classes[order]]
    return np.minimum(share[classes] + (rank < more[classes]), params.per_subject)


def whole_subjects(chunks: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows, split between subjects only."""
    waiting: list[pa.Table] = []
    for chunk in chunks:
        if not chunk.num_rows:
            continue
        last = int(np.flatnonzero(tables.changes(chunk["subject_id"]))[-1])
        continues = bool(waiting) and waiting[-1]["subject_id"][-1] == chunk["subject_id"][0]
        if waiting and (last or not continues):
            yield pa.concat_tables([*waiting, chunk[:last]])
            waiting = []
        elif last:
            yield chunk[:last]
        waiting.append(chunk[last:])
    if waiting:
        yield pa.concat_tables(waiting)


def with_both_roles(chunks: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield these whole subjects without those whose photos have roles and lack one, as these make no sample."""
    for chunk in chunks:
        new = tables.changes(chunk["subject_id"])
        has = [np.logical_or.reduceat(may_be(role, chunk), np.flatnonzero(new)) for role in ("reference", "target")]
        found = chunk.filter(pa.array((has[0] & has[1])[np.cumsum(new) - 1]))
        if found.num_rows:
            yield found


def may_be(role: str, frames: pa.Table) -> np.ndarray:
    """Return whether each frame may be used in this role [rows], bool."""
    return pc.fill_null(pc.equal(frames["role"], role), True).to_numpy()


def select(frames: pa.Table, counts: np.ndarray, params: TripletParams) -> pa.Table:
    """Return rows of the triplets table, the same for the same subject, frames and params.

    Targets cycle through the frames. For reference and positive, a distance is drawn from the band, evenly spread over
    a subject's samples, and the frame nearest to it is chosen, those inside the band first, so that angles spread over
    the band and a subject with few views still gets its best ones. The distance is the angle between viewing directions
    if three frames or more have poses (the others are left out), otherwise how far apart the frames are in the capture,
    which is the order of the numbers in their names (2 before 10).
    The three frames differ if the subject has three; with two, positive and target coincide; with one, all do, and
    augmentation has to make the difference.
    Where photos have roles, targets take turns among those that are targets, and reference and positive among the
    others, whatever their poses.

    Args:
        frames: COLUMNS of whole subjects, in key order, at least one row.
        counts: triplets of each of these subjects [S], 1 .. per_subject.
    """
    frames = in_capture_order(frames.combine_chunks())
    new = tables.changes(frames["subject_id"])
    starts, subject = np.flatnonzero(new), np.cumsum(new) - 1
    directions = poses.viewing_directions(frames, starts)
    posed = np.isfinite(directions).all(axis=1)
    given = np.logical_or.reduceat(frames["role"].is_valid().to_numpy(), starts)
    by_pose = (np.add.reduceat(posed, starts) >= 3) & ~given
    usable = np.flatnonzero(posed | ~by_pose[subject])
    sizes = np.bincount(subject[usable], minlength=len(starts))
    firsts = np.cumsum(sizes) - sizes
    keys = _keys(frames["subject_id"].take(pa.array(starts)), params.seed)
    chosen = np.empty((3, len(starts), params.per_subject), dtype=np.int64)  # rows of reference, positive, target
    angles = np.full((2, len(starts), params.per_subject), np.nan)
    for size, pose in {(int(n), bool(p)) for n, p in zip(sizes, by_pose, strict=True)}:
        alike = np.flatnonzero((sizes == size) & (by_pose == pose) & ~given)
        step = max(1, _CELLS // (size * params.per_subject))
        for some in (alike[at : at + step] for at in range(0, len(alike), step)):
            rows = usable[firsts[some][:, None] + np.arange(size)]
            picked, distances = _pick(keys[some], directions[rows] if pose else None, size, params)
            chosen[:, some] = np.take_along_axis(rows[None], picked, axis=2)
            if pose:
                angles[:, some] = distances
    may = [may_be(role, frames) for role in ("reference", "target")]
    per_role = np.stack([np.add.reduceat(some, starts, dtype=np.int64) for some in may], axis=1)
    for size, *of_role in {(int(sizes[n]), *map(int, per_role[n])) for n in np.flatnonzero(given)}:
        some = np.flatnonzero((sizes == size) & (per_role == of_role).all(axis=1) & given)
        rows = usable[firsts[some][:, None] + np.arange(size)]
        picked = _by_role(keys[some], may[0][rows], may[1][rows], params)
        chosen[:, some] = np.take_along_axis(rows[None], picked, axis=2)
    wanted = np.arange(params.per_subject) < counts[:, None]
    owner, index = np.nonzero(wanted)
    ids, first_row = frames["frame_id"], pa.array(starts[owner])
    subject_ids = frames["subject_id"].take(first_row)
    numbers = pa.array([f"{number:03d}" for number in range(params.per_subject)]).take(pa.array(index))
    method = np.where(given, "role", np.where(sizes == 1, "augment", np.where(by_pose, "pose", "order")))[owner]
    columns = {
        "triplet_id": pc.binary_join_element_wise(subject_ids, numbers, "/"),
        "subject_id": subject_ids,
        "class_name": frames["class_name"].take(first_row),
        **{role: ids.take(pa.array(chosen[n][wanted])) for n, role in enumerate(("reference", "positive", "target"))},
        "reference_target_angle": _nullable(angles[0][wanted]),
        "reference_positive_angle": _nullable(angles[1][wanted]),
        "method": pa.array(method),
    }
    return pa.table(columns).cast(tables.spec("triplets").schema)


def in_capture_order(frames: pa.Table) -> pa.Table:
    """Return the rows with each subject's frames in the order of the numbers in their names; subjects stay in place.

    Key order is that of text, which is the same where numbers have leading zeros: only subjects whose names differ in
    length are looked at one by one.
    """
    new = tables.changes(frames["subject_id"])
    starts = np.flatnonzero(new)
    lengths = pc.utf8_length(frames["frame_id"]).to_numpy()
    uneven = np.minimum.reduceat(lengths, starts) != np.maximum.reduceat(lengths, starts)
    if not uneven.any():
        return frames
    order = np.arange(len(new))
    ends = np.append(starts[1:], len(new))
    for start, end in zip(starts[uneven], ends[uneven], strict=True):
        names = frames["frame_id"][start:end].to_pylist()
        order[start:end] = start + np.array(
            sorted(range(end - start), key=[_number_order(n) for n in names].__getitem__)
        )
    return frames.take(pa.array(order))


def _number_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that compares runs of digits as numbers: by length without leading zeros, then as text."""
    parts = re.split(r"([0-9]+)", name)
    return [(len(part.lstrip("0")), part.lstrip("0")) if at % 2 else (0, part) for at, part in enumerate(parts)]


def _pick(
    keys: np.ndarray, directions: np.ndarray | None, size: int, params: TripletParams
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of reference, positive and target among the frames [3, S, K], and the distances from reference
    to target and to positive [2, S, K].

    Args:
        keys: of the subjects [S]. directions: [S, n, 3], None for distances in the capture. size: n.
    """
    subjects, samples = len(keys), np.arange(params.per_subject)
    chance = _uniform(keys[:, None], np.arange(size))
    target = np.argsort(chance, axis=1, kind="stable")[:, samples % size]
    band = params.angle_band if directions is not None else params.order_band

    def distances(places: np.ndarray) -> np.ndarray:
        if directions is None:
            return np.abs(places[:, :, None] - np.arange(size)) / max(size - 1, 1)
        chosen = np.take_along_axis(directions, places[:, :, None], axis=1)
        return poses.angles(chosen[:, :, None], directions[:, None])

    def nearest(distance: np.ndarray, stream: int, itself: np.ndarray, repeated: np.ndarray | None) -> np.ndarray:
        even = _uniform(keys, np.array([-1 - stream]))[:, None] + samples * _STEPS[stream]
        drawn = band[0] + (band[1] - band[0]) * (even % 1.0)
        rounded = distance.round(_GRAIN)
        cost = np.abs(rounded - drawn[:, :, None]).round(_GRAIN) + chance[:, None] * 10.0**-_GRAIN
        cost += _OUTSIDE * ((rounded < band[0]) | (rounded > band[1]))
        np.put_along_axis(cost, itself[:, :, None], _ITSELF, axis=2)
        if repeated is not None:
            apart = np.where(repeated == itself, _ITSELF, _REPEATED)
            np.put_along_axis(cost, repeated[:, :, None], apart[:, :, None], axis=2)
        return cost.argmin(axis=2)

    to_target = distances(target)
    reference = nearest(to_target, 0, target, None)
    from_reference = distances(reference)
    positive = nearest(from_reference, 1, reference, target)
    found = np.empty((2, subjects, len(samples)))
    found[0] = np.take_along_axis(from_reference, target[:, :, None], axis=2)[:, :, 0]
    found[1] = np.take_along_axis(from_reference, positive[:, :, None], axis=2)[:, :, 0]
    return np.stack([reference, positive, target]), found


def _by_role(keys: np.ndarray, reference: np.ndarray, target: np.ndarray, params: TripletParams) -> np.ndarray:
    """Return the indices of reference, positive and target among the frames [3, S, K].

    Args:
        keys: of the subjects [S].
        reference, target: whether a frame may be that [S, n]; as many may in each subject.
    """
    samples = np.arange(params.per_subject)
    chance = _uniform(keys[:, None], np.arange(reference.shape[1]))
    few, many = int(reference[0].sum()), int(target[0].sum())
    turns = (samples + samples // math.lcm(few, many)) % few  # each meets every target before a pair repeats
    references = np.argsort(np.where(reference, chance, 1.0), axis=1, kind="stable")
    targets = np.argsort(np.where(target, chance, 1.0), axis=1, kind="stable")
    return np.stack([references[:, turns], references[:, (turns + 1) % few], targets[:, samples % many]])


def _subjects(frames: Iterable[pa.Table]) -> pa.Table:
    """Return each subject's `id` and `class`, a number."""
    ids, names = [], []
    for chunk in with_both_roles(whole_subjects(frames)):
        first = chunk.filter(pa.array(tables.changes(chunk["subject_id"])))
        ids += first["subject_id"].chunks
        names += first["class_name"].chunks
    classes = pa.chunked_array(names, pa.string()).combine_chunks().dictionary_encode()
    return pa.table({"id": pa.chunked_array(ids, pa.string()), "class": classes.indices})


def _keys(subject_ids: pa.ChunkedArray, seed: int) -> np.ndarray:
    """Return a number per subject [S] uint64, which depends only on its id and the seed, not on other subjects."""
    ids = np.fromiter((zlib.crc32(i.encode()) for i in subject_ids.to_pylist()), np.uint64, len(subject_ids))
    return _mix(ids + (np.uint64(seed & 0xFFFFFFFF) << np.uint64(32)))


def _uniform(keys: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return numbers in [0, 1) by key and index: an independent, counter-based random generator per key."""
    mixed = _mix(keys ^ _mix(index.astype(np.int64).view(np.uint64)))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): neighbouring inputs give unrelated outputs. uint64."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values.astype(np.float32), mask=np.isnan(values))
