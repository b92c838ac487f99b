"""Items of the stages after curate: by subject, with values of another table beside the frames that have one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import tables
from pipelines.engine import subjects
from tests.world.tables import frame, write

# In the order of tables: part by part, so that "a/b" comes before "a-1/b".
SUBJECTS = ("s/a", "s/a-1", "s/b")


@pytest.fixture
def curated(tmp_path: Path) -> Path:
    write(tmp_path, "frames", [frame(f"{subject}/{view:03d}") for subject in SUBJECTS for view in range(3)])
    return tmp_path


def test_each_subject_is_an_item_with_its_frames_and_the_columns_asked_for(curated: Path):
    items = list(subjects.items(curated, ["path"]))
    assert [item.id for item in items] == sorted(SUBJECTS, key=tables.path_order)
    for item in items:
        assert item.frame_ids == tuple(f"{item.id}/{view:03d}" for view in range(3))
        assert all(row.keys() == {"frame_id", "subject_id", "sha256", "path"} for row in item.payload)


@pytest.mark.parametrize("left_out", [(), ("s/a/000",), ("s/a-1/000", "s/a-1/001", "s/a-1/002"), ("s/b/002",)])
def test_pairs_in_order_do_as_well_as_a_mapping(curated: Path, left_out: tuple[str, ...]):
    ids = [row["frame_id"] for row in tables.rows(curated, "frames") if row["frame_id"] not in left_out]
    values = {name: {"value": name} for name in ids}
    strangers = {"r/a/000": {}, "s/a/0005": {}, "t/a/000": {}}  # of frames that are not in the table
    pairs = sorted((values | strangers).items(), key=lambda pair: tables.path_order(pair[0]))
    by_pairs = list(subjects.items(curated, [], iter(pairs)))
    assert by_pairs == list(subjects.items(curated, [], values | strangers))
    assert [row["frame_id"] for item in by_pairs for row in item.payload] == ids
    assert all(row["extra"] == {"value": row["frame_id"]} for item in by_pairs for row in item.payload)


def test_other_value_is_another_fingerprint_of_its_subject_only(curated: Path):
    values: dict[str, Any] = {row["frame_id"]: 1 for row in tables.rows(curated, "frames")}
    before = {item.id: item.fingerprint for item in subjects.items(curated, [], values)}
    after = {item.id: item.fingerprint for item in subjects.items(curated, [], values | {"s/b/001": 2})}
    assert {name for name in before if before[name] != after[name]} == {"s/b"}


def test_pairs_are_drawn_no_further_than_the_subject_at_hand(curated: Path):
    drawn: list[str] = []

    def pairs() -> Iterator[tuple[str, int]]:
        for row in tables.rows(curated, "frames"):
            drawn.append(row["frame_id"])
            yield row["frame_id"], 1

    next(subjects.items(curated, [], pairs()))
    assert len(drawn) == 3
