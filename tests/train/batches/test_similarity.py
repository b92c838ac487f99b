"""Similarities between subjects out of the tiles of their table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines import tables
from runtime.errors import UserError
from tests.world.batches import read
from tests.world.training import write_world


def test_each_pair_of_a_group_has_its_cosine_in_every_grouping(tmp_path: Path):
    """Groups of at most 12 subjects in tiles of 5."""
    world = write_world(tmp_path / "data", views=20, single=4, group_size=12)
    found = read(world.data).similarity
    cosines = (world.vectors @ world.vectors.T).astype(np.float16).astype(np.float32)
    place = np.array([world.subject_ids.index(name) for name in found.subject_ids.to_pylist()])
    assert found.groups.shape == (2, 24)
    for grouping, groups in enumerate(found.groups):
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)[::-1]
            expected = cosines[np.ix_(place[members[:3]], place[members])]
            np.testing.assert_array_equal(found.between(grouping, members[:3], members), expected)


def test_missing_tile_is_one_sentence(tmp_path: Path):
    data = write_world(tmp_path / "data", views=10, single=2).data
    rows = tables.read(data / "similarity", "similarity").to_pylist()
    gone = next(row["tile_id"] for row in rows if row["tile_id"].endswith("/000/001"))
    kept = [row for row in rows if row["tile_id"] != gone]
    tables.write(data / "similarity", "similarity", tables.from_rows("similarity", kept))
    with pytest.raises(UserError, match=f"tile '{gone}' is missing; run similarity again"):
        read(data)
