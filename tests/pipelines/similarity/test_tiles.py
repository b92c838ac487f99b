"""Prototypes of subjects, and the tiles that hold every pair inside a group and no other."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import tables
from pipelines.similarity.tiles import Overview, alike, groups, prototypes, tiles, unit
from pipelines.similarity.worker import SimilarityParams
from tests.world.tables import embedding, write


@pytest.fixture(scope="module")
def params(section) -> SimilarityParams:
    return section("similarity", SimilarityParams)


def subjects(count: int, width: int = 6, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Ids and unit vectors that are all a little alike, as those of an encoder."""
    vectors = np.random.default_rng(seed).normal(0.5, 1.0, (count, width)).astype(np.float32)
    return [f"s/{n:03d}" for n in range(count)], unit(vectors)


def rows_of(*args) -> list[dict]:
    """What `tiles` yields, as dictionaries."""
    return [row for table in tiles(*args) for row in table.to_pylist()]


def pairs(rows: list[dict]) -> list[tuple[str, str, float]]:
    """Every (row subject, column subject, cosine) of some tiles."""
    found = []
    for row in rows:
        keys = product(row["row_subjects"], row["column_subjects"])
        found += [(a, b, float(v)) for (a, b), v in zip(keys, row["values"], strict=True)]
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 45), st.integers(1, 20), st.integers(1, 3), st.integers(0, 5))
def test_tiles_hold_exactly_the_pairs_inside_the_groups_of_each_grouping(
    params, count, group_size, tile, groupings, seed
):
    sizes = {"group_size": group_size, "tile": tile, "groupings": groupings, "seed": seed}
    params = params.model_copy(update=sizes)
    ids, vectors = subjects(count)
    rows = rows_of(ids, vectors, params)
    assert [row["tile_id"] for row in rows] == sorted(row["tile_id"] for row in rows)
    assert len({row["tile_id"] for row in rows}) == len(rows)
    for grouping in range(groupings):
        of_grouping = [row for row in rows if row["grouping"] == grouping]
        partition = groups(count, group_size, seed + grouping)
        assert sorted(np.concatenate(partition).tolist() if partition else []) == list(range(count))
        assert all(len(group) <= group_size for group in partition)
        expected = {(ids[a], ids[b]) for group in partition for a, b in product(group, group)}
        found = pairs(of_grouping)
        assert {(a, b) for a, b, _ in found} == expected and len(found) == len(expected)
        for row in of_grouping:
            members = {ids[k] for k in partition[row["group"]]}
            assert {*row["row_subjects"], *row["column_subjects"]} <= members
            assert max(len(row["row_subjects"]), len(row["column_subjects"])) <= tile
    cosines = {(a, b): v for a, b, v in pairs(rows)}
    where = {subject: n for n, subject in enumerate(ids)}
    for (a, b), value in cosines.items():
        assert abs(value - cosines[b, a]) < 1e-3
        assert abs(value - vectors[where[a]] @ vectors[where[b]]) < 1e-3 and -1 <= value <= 1
        assert a != b or abs(value - 1) < 1e-3


@pytest.mark.parametrize("group_size", [9, 4096])
def test_as_many_subjects_as_a_group_holds_give_the_full_matrix(group_size, params):
    ids, vectors = subjects(9)
    (table,) = tiles(ids, vectors, params.model_copy(update={"group_size": group_size, "seed": 3}))
    assert table.schema.equals(tables.spec("similarity").schema)
    (row,) = table.to_pylist()
    assert row["row_subjects"] == row["column_subjects"] == ids
    found = np.array(row["values"]).reshape(9, 9)
    assert np.array_equal(found, found.astype(np.float16)) and found == pytest.approx(vectors @ vectors.T, abs=1e-3)


def test_another_grouping_brings_other_subjects_together(params):
    ids, vectors = subjects(40)
    rows = rows_of(ids, vectors, params.model_copy(update={"group_size": 10, "groupings": 2}))
    met = [{(a, b) for a, b, _ in pairs([r for r in rows if r["grouping"] == g])} for g in (0, 1)]
    assert len(met[0]) == len(met[1]) == 400 and met[0] != met[1]
    again = rows_of(ids, vectors, params.model_copy(update={"group_size": 10, "groupings": 2}))
    assert tables.from_rows("similarity", rows).equals(tables.from_rows("similarity", again))


@given(st.integers(1, 500), st.integers(1, 60), st.integers(0, 9))
def test_groups_are_of_one_size_up_to_one_subject(count, size, seed):
    sizes = [len(group) for group in groups(count, size, seed)]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= size and sum(sizes) == count


def test_tiles_come_back_from_their_table(params, tmp_path):
    ids, vectors = subjects(7)
    small = params.model_copy(update={"tile": 3})
    rows = rows_of(ids, vectors, small)
    tables.write_parts(tmp_path, "similarity", tiles(ids, vectors, small))
    back = list(tables.rows(tmp_path, "similarity"))
    assert len(back) == 9 and pairs(back) == pairs(rows)
    (whole,) = tables.parts(tmp_path, "similarity")
    tables.write(tmp_path / "whole", "similarity", tables.from_rows("similarity", rows))
    assert whole.read_bytes() == (tmp_path / "whole" / "similarity" / "part-00000.parquet").read_bytes()


def embeddings(folder, vectors: dict[str, list[list[float]]]) -> None:
    rows = (embedding(f"{subject}/{n}", vector) for subject, found in vectors.items() for n, vector in enumerate(found))
    write(folder, "embeddings", rows)


def test_prototype_is_the_mean_of_unit_vectors_whatever_their_length_scaled_to_one(tmp_path):
    embeddings(tmp_path, {"s/b": [[0.0, 2.0]], "s/a": [[1.0, 0.0], [0.0, 0.25], [4.0, 0.0]], "s/b-1": [[0.0, -1.0]]})
    ids, found = prototypes(tmp_path)
    assert ids == ["s/a", "s/b", "s/b-1"]
    mean = np.array([2 / 3, 1 / 3])
    assert found == pytest.approx(np.array([mean / np.linalg.norm(mean), [0, 1], [0, -1]]), abs=1e-6)


def test_no_embeddings_make_no_tiles(tmp_path, params):
    embeddings(tmp_path, {})
    ids, found = prototypes(tmp_path)
    assert (ids, len(found)) == ([], 0) and rows_of(ids, found, params) == []
    assert Overview(0, 3).neighbours([]).num_rows == 0 and Overview(0, 3).mean() is None


def test_prototypes_do_not_depend_on_where_the_parts_are_cut(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    vectors = {f"s/{n:02d}": draw.normal(size=(1 + n % 5, 4)).tolist() for n in range(12)}
    embeddings(tmp_path / "one", vectors)
    whole = tables.read(tmp_path / "one", "embeddings")
    monkeypatch.setattr(tables.files, "PART_BYTES", 1)
    tables.write_parts(tmp_path / "many", "embeddings", [whole.slice(n, 1) for n in range(len(whole))])
    assert len(tables.parts(tmp_path / "many", "embeddings")) == len(whole)
    ids, found = prototypes(tmp_path / "one")
    again = prototypes(tmp_path / "many")
    assert ids == again[0] == sorted(vectors) and np.array_equal(found, again[1])


def test_mean_cosine_leaves_out_subjects_with_themselves(params):
    ids, vectors = subjects(5)
    overview = Overview(5, 0)
    rows_of(ids, vectors, params.model_copy(update={"tile": 2}), overview)
    cosines = vectors @ vectors.T
    assert (overview.tiles, overview.pairs) == (9, 20)
    assert overview.mean() == pytest.approx((cosines.sum() - 5) / 20, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 35), st.integers(1, 12), st.integers(1, 3), st.integers(0, 6))
def test_neighbours_are_the_most_similar_others_met_in_any_grouping(
    params, count, group_size, tile, groupings, neighbours
):
    sizes = {"group_size": group_size, "tile": tile, "groupings": groupings, "neighbours": neighbours}
    params = params.model_copy(update=sizes)
    ids, vectors = subjects(count)
    overview = Overview(count, neighbours)
    rows = rows_of(ids, vectors, params, overview)
    table = overview.neighbours(ids)
    assert table.schema.equals(tables.spec("neighbours").schema)
    met = {(a, b): v for a, b, v in pairs(rows) if a != b}
    for row in table.to_pylist():
        others = [(b, v) for (a, b), v in met.items() if a == row["subject_id"]]
        assert len(row["neighbours"]) == len(set(row["neighbours"])) == min(neighbours, len(others))
        assert set(row["neighbours"]) <= {b for b, _ in others}
        best = sorted((v for _, v in others), reverse=True)[:neighbours]
        assert row["cosines"] == pytest.approx(best, abs=1e-3)
        assert row["cosines"] == sorted(row["cosines"], reverse=True)


def test_equally_similar_subjects_are_listed_by_their_ids(params):
    ids, vectors = subjects(1)
    ids, vectors = [f"s/{n}" for n in range(6)], np.repeat(vectors, 6, axis=0)
    overview = Overview(6, 4)
    rows_of(ids, vectors, params.model_copy(update={"tile": 4, "neighbours": 4}), overview)
    assert overview.neighbours(ids)["neighbours"].to_pylist()[5] == ["s/0", "s/1", "s/2", "s/3"]


def test_table_of_many_parts_is_written_whole_or_not_at_all(params, tmp_path, monkeypatch):
    ids, vectors = subjects(40)
    small = params.model_copy(update={"tile": 10})
    monkeypatch.setattr(tables.files, "PART_BYTES", 1500)
    tables.write_parts(tmp_path, "similarity", tiles(ids, vectors, small))
    before = [part.read_bytes() for part in tables.parts(tmp_path, "similarity")]
    assert len(before) > 2 and tables.count(tmp_path, "similarity") == 16

    def broken():
        yield from list(tiles(ids, vectors, small))[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tables.write_parts(tmp_path, "similarity", broken())
    assert [part.read_bytes() for part in tables.parts(tmp_path, "similarity")] == before
    tables.write_parts(tmp_path, "similarity", tiles(ids, vectors, small))
    assert [part.read_bytes() for part in tables.parts(tmp_path, "similarity")] == before
    firsts = [batch.num_rows for batch in tables.batches(tmp_path, "similarity", ["tile_id"], 1)]
    assert firsts == [1] * 16


@pytest.mark.parametrize(("group_size", "tile", "groupings"), [(40, 40, 1), (40, 7, 1), (10, 4, 2), (1, 1, 1)])
def test_alike_are_all_pairs_of_a_group_that_reach_the_cosine_each_once(params, group_size, tile, groupings):
    changed = {"group_size": group_size, "tile": tile, "groupings": groupings, "same_subject": 0.7}
    params = params.model_copy(update=changed)
    _, vectors = subjects(40)
    found, cosines = alike(vectors, params)
    met = {
        (a, b)
        for grouping in range(groupings)
        for members in groups(40, group_size, params.seed + grouping)
        for a, b in product(members.tolist(), repeat=2)
        if a < b
    }
    expected = {(a, b) for a, b in met if vectors[a] @ vectors[b] >= 0.7}
    assert len(found) == len({*map(tuple, found.tolist())})
    assert {*map(tuple, found.tolist())} == expected
    assert cosines == pytest.approx([vectors[a] @ vectors[b] for a, b in found], abs=1e-6)
    assert group_size == 1 or len(expected) > 5
