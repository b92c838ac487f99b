"""Prototypes of subjects, and the tiles that hold every pair inside a group and no other."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import similarity, tables
from pipelines.similarity import SimilarityParams, groups, off_diagonal, prototypes, tiles, unit


@pytest.fixture(scope="module")
def params(section) -> SimilarityParams:
    return section("similarity", SimilarityParams)


def subjects(count: int, width: int = 6, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Ids and unit vectors that are all a little alike, as those of an encoder."""
    vectors = np.random.default_rng(seed).normal(0.5, 1.0, (count, width)).astype(np.float32)
    return [f"s/{n:03d}" for n in range(count)], unit(vectors)


def pairs(rows: list[dict]) -> list[tuple[str, str, float]]:
    """Every (row subject, column subject, cosine) of some tiles."""
    found = []
    for row in rows:
        keys = product(row["row_subjects"], row["column_subjects"])
        found += [(a, b, float(v)) for (a, b), v in zip(keys, row["values"], strict=True)]
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 45), st.integers(1, 20), st.integers(1, 3), st.integers(0, 5))
def test_tiles_hold_exactly_the_pairs_inside_the_groups_of_each_grouping(count, group_size, tile, groupings, seed):
    params = SimilarityParams(
        encoder="clip",
        margin=0.05,
        group_size=group_size,
        groupings=groupings,
        tile=tile,
        seed=seed,
        batch_size=2,
        shard_subjects=1,
    )
    ids, vectors = subjects(count)
    rows = tiles(ids, vectors, params)
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
        assert value == cosines[b, a]
        assert abs(value - vectors[where[a]] @ vectors[where[b]]) < 1e-3 and -1 <= value <= 1
        assert a != b or abs(value - 1) < 1e-3


@pytest.mark.parametrize("group_size", [9, 4096])
def test_as_many_subjects_as_a_group_holds_give_the_full_matrix(group_size, params):
    ids, vectors = subjects(9)
    (row,) = tiles(ids, vectors, params.model_copy(update={"group_size": group_size, "seed": 3}))
    assert row["row_subjects"] == row["column_subjects"] == ids
    assert row["values"].dtype == np.float16
    assert np.array_equal(row["values"].reshape(9, 9), np.clip(vectors @ vectors.T, -1, 1).astype(np.float16))


def test_another_grouping_brings_other_subjects_together(params):
    ids, vectors = subjects(40)
    rows = tiles(ids, vectors, params.model_copy(update={"group_size": 10, "groupings": 2}))
    met = [{(a, b) for a, b, _ in pairs([r for r in rows if r["grouping"] == g])} for g in (0, 1)]
    assert len(met[0]) == len(met[1]) == 400 and met[0] != met[1]
    again = tiles(ids, vectors, params.model_copy(update={"group_size": 10, "groupings": 2}))
    assert tables.from_rows("similarity", rows).equals(tables.from_rows("similarity", again))


@given(st.integers(1, 500), st.integers(1, 60), st.integers(0, 9))
def test_groups_are_of_one_size_up_to_one_subject(count, size, seed):
    sizes = [len(group) for group in groups(count, size, seed)]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= size and sum(sizes) == count


def test_tiles_come_back_from_their_table(params, tmp_path):
    ids, vectors = subjects(7)
    rows = tiles(ids, vectors, params.model_copy(update={"tile": 3}))
    tables.write(tmp_path, "similarity", tables.from_rows("similarity", rows))
    back = list(tables.rows(tmp_path, "similarity"))
    assert len(back) == 9 and pairs(back) == pairs(rows)


def embeddings(folder, vectors: dict[str, list[list[float]]]) -> None:
    rows = [
        {"frame_id": f"{subject}/{n}", "subject_id": subject, "encoder": "e", "vector": vector}
        for subject, found in vectors.items()
        for n, vector in enumerate(found)
    ]
    tables.write(folder, "embeddings", tables.from_rows("embeddings", rows))


def test_prototype_is_the_mean_of_unit_vectors_whatever_their_length_scaled_to_one(tmp_path):
    embeddings(tmp_path, {"s/b": [[0.0, 2.0]], "s/a": [[1.0, 0.0], [0.0, 0.25], [4.0, 0.0]], "s/b-1": [[0.0, -1.0]]})
    ids, found = prototypes(tmp_path)
    assert ids == ["s/a", "s/b", "s/b-1"]
    mean = np.array([2 / 3, 1 / 3])
    assert found == pytest.approx(np.array([mean / np.linalg.norm(mean), [0, 1], [0, -1]]), abs=1e-6)


def test_no_embeddings_make_no_tiles(tmp_path, params):
    embeddings(tmp_path, {})
    ids, found = prototypes(tmp_path)
    assert (ids, len(found)) == ([], 0) and tiles(ids, found, params) == []


def test_mean_cosine_leaves_out_subjects_with_themselves(params):
    ids, vectors = subjects(5)
    between = np.concatenate([off_diagonal(row) for row in tiles(ids, vectors, params.model_copy(update={"tile": 2}))])
    assert len(between) == 20 and between.max() < 0.999


def test_rows_of_the_embeddings_table_are_unit_vectors_of_the_chosen_encoder(section, tmp_path):
    from PIL import Image

    from pipelines.storage import SourceParams

    rng = np.random.default_rng(0)
    mask = np.zeros((64, 64), dtype=bool)
    mask[10:50, 20:40] = True
    frames = []
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        extra = {"rle": tables.encode_mask(mask), "height": 64, "width": 64}
        row = {"frame_id": f"s/{number % 2}/{number}", "subject_id": f"s/{number % 2}", "source": "own"}
        frames.append(row | {"path": f"{number}.png", "extra": extra})
    source = SourceParams(name="own", layout="folder", root=str(tmp_path), split="train")
    for encoder in ("clip", "dino"):
        params = section("similarity", SimilarityParams, encoder=encoder)
        worker = similarity.SimilarityWorker(params, "toybox", [source], "cpu")
        together = worker.compute([[frames[0], frames[2]], [frames[1]]])
        assert [len(rows["embeddings"]) for rows in together] == [2, 1]
        vectors = np.array([row["vector"] for rows in together for row in rows["embeddings"]], dtype=np.float32)
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=2e-3)
        (alone,) = worker.compute([[frames[1]]])
        assert np.array_equal(alone["embeddings"][0]["vector"], together[1]["embeddings"][0]["vector"])
