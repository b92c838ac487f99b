"""Usable photos: training split, mask of quality ok, not rejected by similarity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import tables
from pipelines.pairs.usable import NO_MASK, training_frames
from tests.world.tables import frame, mask, write

COLUMNS = ("frame_id", "subject_id")
STAGES = ("curate", "mask", "similarity")

# Tables sort "s/a/9" before "s/a-1/0", strings the other way round.
ids = st.builds("s/{}/{}".format, st.sampled_from(("a", "a-1", "b", "b/c")), st.integers(0, 9))
photos = st.fixed_dictionaries(
    {
        "split": st.sampled_from(("train", "train", "test")),
        "quality": st.sampled_from(("ok", "ok", "border", "small", None)),
        "reject": st.sampled_from((None, None, "same_subject", "crashed")),
    }
)
cuts = st.integers(1, 30)


def write_photos(folder: Path, some: dict[str, dict]) -> None:
    """Write the three tables for photos given by frame_id with split, mask quality and similarity's reject reason."""
    write(folder / "curate", "frames", [frame(i, split=photo["split"]) for i, photo in some.items()])
    write(folder / "mask", "masks", [mask(i, quality=p["quality"]) for i, p in some.items() if p["quality"]])
    rejects = [tables.reject(i, "similarity", p["reject"]) for i, p in some.items() if p["reject"]]
    write(folder / "similarity", "rejects", rejects)


def cut_into_parts(folder: Path, name: str, rows: int) -> None:
    """Rewrite a table with `rows` rows per part."""
    whole = tables.read(folder, name)
    with tables.replacing(folder, name) as part:
        for number, at in enumerate(range(0, max(len(whole), 1), rows)):
            tables.write_part(part(number), name, whole.slice(at, rows))


def reading(patch: pytest.MonkeyPatch, sizes: dict[str, int]) -> None:
    """Make `tables.stream` yield this many rows at a time, by table."""
    stream = tables.stream
    patch.setattr(tables, "stream", lambda folder, name, columns: stream(folder, name, columns, sizes[name]))


def used(folder: Path, columns: tuple[str, ...] = COLUMNS) -> tuple[list[dict], Counter[str]]:
    """Rows of the usable photos, and the number of unusable ones by reason."""
    reasons: Counter[str] = Counter()
    found: list[pa.Table] = list(training_frames(*(folder / stage for stage in STAGES), columns, reasons))
    assert all(len(stretch) and stretch.column_names == list(columns) for stretch in found)
    return [row for stretch in found for row in stretch.to_pylist()], reasons


def one_by_one(some: dict[str, dict]) -> tuple[list[dict], Counter[str]]:
    """The same, with the rule written out plainly."""
    rows, reasons = [], Counter[str]()
    for frame_id in sorted(some, key=tables.path_order):
        photo = some[frame_id]
        if photo["split"] == "train":
            reason = photo["reject"] or photo["quality"] or NO_MASK
            if reason == "ok":
                rows.append({"frame_id": frame_id, "subject_id": frame_id.rpartition("/")[0]})
            else:
                reasons[reason] += 1
    return rows, reasons


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(ids, photos, max_size=30), cuts, cuts, cuts, cuts, cuts)
def test_usable_photos_follow_the_rule_however_the_tables_are_cut(
    tmp_path_factory, some, frames_part, masks_part, rejects_part, frames_read, masks_read
):
    folder = tmp_path_factory.mktemp("tables")
    write_photos(folder, some)
    expected = one_by_one(some)
    assert used(folder) == expected
    cut_into_parts(folder / "curate", "frames", frames_part)
    cut_into_parts(folder / "mask", "masks", masks_part)
    cut_into_parts(folder / "similarity", "rejects", rejects_part)
    with pytest.MonkeyPatch.context() as patch:
        reading(patch, {"frames": frames_read, "masks": masks_read})
        assert used(folder) == expected


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_masks_of_photos_that_are_no_frames_do_no_harm(tmp_path, monkeypatch, size):
    """Masks of an earlier run, before curate dropped some photos."""
    some = {f"s/{subject}/{n}": {"split": "train", "quality": "ok", "reject": None} for subject in "abc" for n in "012"}
    gone = ("s/a/0", "s/b/0", "s/b/1", "s/b/2", "s/c/2")
    write_photos(tmp_path, some)
    write(tmp_path / "curate", "frames", [frame(i) for i in some if i not in gone])
    reading(monkeypatch, {"frames": 2, "masks": size})
    rows, reasons = used(tmp_path)
    assert [row["frame_id"] for row in rows] == ["s/a/1", "s/a/2", "s/c/0", "s/c/1"] and not reasons


def test_columns_come_once_and_in_the_requested_order(tmp_path):
    write_photos(tmp_path, {"s/a/0": {"split": "train", "quality": "ok", "reject": None}})
    (row,), _ = used(tmp_path, ("split", "class_name", "frame_id"))
    assert row == {"split": "train", "class_name": "mug", "frame_id": "s/a/0"}


def test_masks_are_read_no_further_than_the_frames_at_hand(tmp_path, monkeypatch):
    """Memory does not grow with the tables."""
    some = {f"s/{n:02d}/0": {"split": "train", "quality": "ok", "reject": None} for n in range(40)}
    write_photos(tmp_path, some)
    stream, drawn = tables.stream, Counter[str]()

    def counted(folder: Path, name: str, columns: tuple[str, ...]) -> Iterator[pa.Table]:
        for piece in stream(folder, name, columns, 4):
            drawn[name] += 1
            yield piece

    monkeypatch.setattr(tables, "stream", counted)
    for number, _ in enumerate(training_frames(*(tmp_path / stage for stage in STAGES), COLUMNS), 1):
        assert drawn == {"frames": number, "masks": number}
