"""The same picture under two subjects is kept once."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import tables
from pipelines.curate import duplicates
from tests.world.tables import frame

RNG = np.random.default_rng(0)
A, B, C = (RNG.bytes(32) for _ in range(3))


def flipped(phash: bytes, *bits: int) -> bytes:
    number = int.from_bytes(phash)
    for bit in bits:
        number ^= 1 << bit
    return number.to_bytes(32)


def frames(*rows: tuple):
    """(frame_id, hash[, split[, path]]) rows of the frames table."""
    made = []
    for frame_id, phash, *more in rows:
        made.append(frame(frame_id, phash=phash, **dict(zip(("split", "path"), more, strict=False))))
    return tables.from_rows("frames", made)


def across_subjects(table, max_bits: int) -> dict[str, str]:
    """{frame_id that goes: frame_id that stays}, the same wherever the table is cut into stretches."""
    ids = table["frame_id"].to_pylist()
    found = [
        duplicates.across_subjects([table[at : at + size] for at in range(0, len(table), size)], max_bits)
        for size in (1, 3, max(len(table), 1))
    ]
    assert found[0] == found[1] == found[2]
    return {ids[goes]: ids[stays] for goes, stays in found[0].items()}


def test_earlier_subject_keeps_the_picture_and_other_pictures_stay():
    table = frames(("s/a/0", A), ("s/b/0", flipped(A, 3, 77, 200)), ("s/b/1", B), ("s/c/0", C))
    assert across_subjects(table, 8) == {"s/b/0": "s/a/0"}
    assert across_subjects(table, 2) == {}


def test_picture_of_a_test_subject_is_never_trained_on():
    table = frames(("s/a/0", A), ("s/z/0", A, "test"), ("s/z/1", B, "test"))
    assert across_subjects(table, 8) == {"s/a/0": "s/z/0"}


def test_frames_of_one_subject_are_no_duplicates_across_subjects():
    assert across_subjects(frames(("s/a/0", A), ("s/a/1", A)), 8) == {}


def test_boxes_of_one_photo_are_one_picture():
    rows = [(f"s/a/{n}/0", A, "train", "one.jpg") for n in range(40)]
    again = [(f"s/b/{n}/0", A, "train", "two.jpg") for n in range(3)]
    assert across_subjects(frames(*rows), 8) == {}
    assert across_subjects(frames(*rows, *again), 8) == {f"s/b/{n}/0": "s/a/0/0" for n in range(3)}


def test_two_copies_of_a_capture_lose_one_of_each_view():
    """Views that are nearly the same picture do not drag each other out."""
    near = flipped(A, 9)
    table = frames(("s/a/0", A), ("s/a/1", near), ("s/b/0", A), ("s/b/1", near))
    assert across_subjects(table, 8) == {"s/b/0": "s/a/0", "s/b/1": "s/a/0"}


def one_by_one(rows: list[tuple], max_bits: int) -> dict[str, str]:
    """What goes and for what, by comparing each picture with every one that stays: test first, then by id."""
    stay: list[tuple] = []
    dropped = {}
    for row in sorted(rows, key=lambda row: (row[2] != "test", row[0])):
        frame_id, phash, _ = row
        for other, known, _ in stay:
            bits = (int.from_bytes(phash) ^ int.from_bytes(known)).bit_count()
            if bits <= max_bits and other.split("/")[1] != frame_id.split("/")[1]:
                dropped[frame_id] = other
                break
        else:
            stay.append(row)
    return dropped


photos = st.tuples(
    st.integers(0, 4),
    st.sampled_from((A, B, bytes(32), b"\xff" * 32)),
    st.sets(st.integers(0, 255), max_size=9),
    st.sampled_from(("train", "train", "test")),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(photos, max_size=14), st.sampled_from((-1, 0, 1, 3, 8, 13, 70)))
def test_same_pictures_are_those_that_comparing_all_with_all_finds(found, max_bits):
    rows = [
        (f"s/{subject}/{n:02d}", flipped(phash, *bits), split) for n, (subject, phash, bits, split) in enumerate(found)
    ]
    assert across_subjects(frames(*rows), max_bits) == one_by_one(rows, max_bits)


@pytest.mark.parametrize("parts", range(1, 17))
def test_no_spread_of_eight_bits_hides_the_same_picture(parts):
    """As many bits in each of the words, of the segments, or of whatever else the hash may be cut into."""
    middles = [(a + b) // 2 for a, b in pairwise(part * 256 // parts for part in range(parts + 1))]
    bits = {(middles[n % parts] + n // parts) % 256 for n in range(8)}
    assert len(bits) == 8
    strangers = [(f"s/m/{n:03d}", RNG.bytes(32)) for n in range(100)]  # between the two, however they are sorted
    table = frames(("s/a/0", A), *strangers, ("s/z/0", flipped(A, *bits)))
    assert across_subjects(table, 8) == {"s/z/0": "s/a/0"}
    assert across_subjects(table, 7) == {}


def test_of_any_number_of_copies_one_stays():
    rows = [(f"s/{n:02d}/0", A) for n in range(40)]
    assert across_subjects(frames(*rows), 8) == {f"s/{n:02d}/0": "s/00/0" for n in range(1, 40)}
    assert across_subjects(frames(*rows[1:], ("s/00/0", flipped(A, 5))), 8) == {
        f"s/{n:02d}/0": "s/00/0" for n in range(1, 40)
    }


def test_dropped_frames_move_to_the_rejects_and_the_rest_of_a_thin_subject_follows(tmp_path):
    rows = [("s/a/0", A), ("s/a/1", B), ("s/b/0", A), ("s/b/1", C), ("s/c/0", B)]
    before = frames(*rows)
    tables.write(tmp_path, "frames", before)
    tables.write(tmp_path, "rejects", tables.from_rows("rejects", [tables.reject("s/a/9", "curate", "blurred")]))
    duplicates.drop(tmp_path, 8, 2, {"s/a": 3, "s/b": 2, "s/c": 1})
    assert tables.read(tmp_path, "frames")["frame_id"].to_pylist() == ["s/a/0", "s/a/1"]
    rejects = {row["id"]: (row["reason"], row["detail"]) for row in tables.rows(tmp_path, "rejects")}
    assert rejects == {
        "s/a/9": ("blurred", ""),
        "s/b/0": ("duplicate", "s/a/0"),
        "s/b/1": ("too_few_views", "1 of 2"),
        "s/c/0": ("duplicate", "s/a/1"),
    }


@pytest.mark.parametrize("rows", [[], [("s/a/0", A)]])
def test_nothing_to_compare_drops_nothing(tmp_path, rows):
    tables.write(tmp_path, "frames", frames(*rows))
    tables.write(tmp_path, "rejects", tables.from_rows("rejects", []))
    duplicates.drop(tmp_path, 8, 2, {"s/a": 1})
    assert tables.read(tmp_path, "frames").num_rows == len(rows)
