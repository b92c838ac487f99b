"""Which pairs an export holds, in which order and shard, and what the plan holds in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import tables
from pipelines.engine.items import Item
from pipelines.export import plan
from pipelines.export.options import ExportOptions
from pipelines.export.plan import Survey
from runtime.errors import UserError
from tests.world.exports import SMALL, SUBJECTS, VIEWS, write_tables
from tests.world.tables import frame, mask, triplet, write

PLAIN = ExportOptions(size=32)


def planned(data: Path, options: ExportOptions = SMALL, left_out: Counter[str] | None = None) -> list[plan.Part]:
    return [item.payload for item in plan.read(data, options, left_out)]


def ids(parts: list[plan.Part]) -> list[str]:
    return [pair["triplet"]["triplet_id"] for part in parts for pair in part.pairs]


def test_pairs_follow_the_triplets_in_numbered_shards(tmp_path):
    parts = planned(write_tables(tmp_path))
    assert [part.name for part in parts] == [f"train-{n:06d}" for n in range(4)]
    assert [len(part.pairs) for part in parts] == [3, 3, 3, 2]
    assert [pair["number"] for part in parts for pair in part.pairs] == list(range(11))
    assert ids(parts) == [f"{subject}/{view:03d}" for subject in SUBJECTS for view in range(VIEWS)][:-1]
    pair = parts[0].pairs[1]
    assert pair["target"]["path"] == "s/cup/blue/1.png" and pair["reference"]["frame_id"] == "s/cup/blue/2"
    assert pair["target"]["extra"]["rle"] and "positive" not in pair
    assert planned(tmp_path / "data", replace(SMALL, views=2))[0].pairs[1]["positive"]["frame_id"] == "s/cup/blue/3"


def test_triplets_that_make_no_pair_are_counted_by_reason(tmp_path):
    left_out = Counter[str]()
    data = write_tables(tmp_path, views=2)
    rows = tables.read(data / "pairs", "triplets").to_pylist()
    write(data / "pairs", "triplets", [*rows, rows[0] | {"triplet_id": "s/cup/blue/009"}])
    kept = ids(planned(data, SMALL, left_out))
    assert len(kept) == 5 and left_out == {"one_photo": 1, "repeated": 1}
    left_out.clear()
    assert not planned(data, replace(SMALL, views=2), left_out)  # two photos are no three views
    assert left_out == {"one_photo": 1, "no_third_view": 6}
    left_out.clear()
    assert len(ids(planned(data, replace(SMALL, per_subject=1), left_out))) == 3
    assert left_out == {"one_photo": 1, "per_subject": 2, "repeated": 1}
    assert left_out.keys() <= plan.LEFT_OUT.keys()


def test_subjects_are_whole_in_a_split_whatever_else_there_is(tmp_path):
    data = write_tables(tmp_path)
    parts = planned(data, replace(SMALL, validation=0.5))
    found = {
        split: {pair["triplet"]["subject_id"] for p in parts if p.split == split for pair in p.pairs}
        for split in plan.SPLITS
    }
    assert found["train"] and found["validation"] and not found["train"] & found["validation"]
    for split in plan.SPLITS:
        numbers = [pair["number"] for part in parts if part.split == split for pair in part.pairs]
        assert numbers == list(range(len(numbers)))
    drawn = [plan.split_of(f"s/{n}", 0.25) for n in range(2000)]
    assert 0.2 < drawn.count("validation") / len(drawn) < 0.3
    assert {plan.split_of(f"s/{n}", 0.0) for n in range(100)} == {"train"}


def test_photos_with_a_bad_mask_or_without_a_row_are_no_pair(tmp_path):
    data = write_tables(tmp_path)
    masks = tables.read(data / "mask", "masks").to_pylist()
    write(data / "mask", "masks", [masks[0] | {"quality": "border"}, *masks[1:]])
    with pytest.raises(UserError, match=r"triplet s/cup/blue/000 names the frame .*/0, which has no row.*pairs"):
        planned(data)
    write(data / "mask", "masks", masks[VIEWS:])
    with pytest.raises(UserError, match="the triplets of s/cup/blue name frames without a row"):
        planned(data)


def test_shard_changes_with_what_it_is_made_of_and_with_nothing_else(tmp_path):
    data = write_tables(tmp_path)
    before = {item.id: item.fingerprint for item in plan.read(data, SMALL)}
    assert before == {item.id: item.fingerprint for item in plan.read(data, SMALL)}
    rows = tables.read(data / "curate", "frames").to_pylist()
    rows[0]["sha256"] = "other bytes"
    write(data / "curate", "frames", rows)
    after = {item.id: item.fingerprint for item in plan.read(data, SMALL)}
    assert [name for name in before if before[name] != after[name]] == ["train/000000", "train/000001"]


def test_a_shard_loses_the_pairs_that_kill_a_worker(tmp_path):
    item = next(iter(plan.read(write_tables(tmp_path), SMALL)))
    left = item.without({"s/cup/blue/001"})
    assert left.frame_ids == ("s/cup/blue/000", "s/cup/blue/002")
    assert [pair["number"] for pair in left.payload.pairs] == [0, 2]


def test_plan_holds_one_subject_and_one_unfinished_shard_of_each_split():
    """However long the tables are: what was taken from them and not yet handed on is counted."""
    taken, subjects, each, options = Counter[str](), 2000, 5, replace(PLAIN, part=50, validation=0.3)

    def triplets() -> Iterator[dict[str, Any]]:
        for n in range(subjects):
            for k in range(each):
                taken["triplets"] += 1
                name = f"s/{n:06d}"
                yield triplet(f"{name}/{k:03d}", f"{name}/{(k + 1) % each}", f"{name}/{(k + 2) % each}", f"{name}/{k}")

    def photos() -> Iterator[Item]:
        for n in range(subjects):
            names = tuple(f"s/{n:06d}/{k}" for k in range(each))
            taken["photos"] += each
            yield Item(f"s/{n:06d}", "", names, [frame(name) | {"extra": mask(name)} for name in names])

    given = most = 0
    for item in plan.plan(triplets(), photos(), options):
        given += len(item.payload.pairs)
        most = max(most, taken["triplets"] - given, taken["photos"] - given)
    assert given == subjects * each
    assert most <= 2 * options.part + 2 * each


def test_survey_counts_without_holding_the_plan(tmp_path):
    data, left_out, options = write_tables(tmp_path), Counter[str](), replace(SMALL, validation=0.5)
    survey = Survey.of(plan.read(data, options, left_out), left_out)
    parts = planned(data, options)
    assert survey.parts == len(parts) and survey.left_out == {"one_photo": 1}
    assert dict(survey.pairs) == {
        split: sum(len(part.pairs) for part in parts if part.split == split) for split in plan.SPLITS
    }
    assert sum(survey.subjects.values()) == 3
    assert [pair["triplet"]["triplet_id"] for pair in survey.examples] == [f"{s}/000" for s in sorted(SUBJECTS)]
    other = Survey.of(plan.read(data, SMALL), Counter())
    assert other.digest != survey.digest and len(other.digest) == 16
