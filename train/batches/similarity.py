"""M, the real similarity between subjects, from the tiles of the similarity table."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables
from runtime.errors import UserError


@dataclass(frozen=True)
class SubjectSimilarity:
    """M: the cosines between the subjects of a group, looked up in the similarity tiles."""

    subject_ids: pa.Array
    groups: np.ndarray
    """[groupings, subjects] group of each subject, -1 if none."""
    blocks: np.ndarray
    """[groupings, subjects] its row of tiles within the group."""
    positions: np.ndarray
    """[groupings, subjects] its place in that row of tiles."""
    tiles: dict[tuple[int, int, int, int], tuple[int, int]]
    """(grouping, group, row block, column block) -> (start of its values, number of columns)."""
    cosines: np.ndarray
    """Values of all tiles, concatenated."""

    @classmethod
    def read(cls, folder: Path, cosines: np.ndarray) -> SubjectSimilarity:
        """Read the layout of the similarity table; `cosines` are its values."""
        names = ["tile_id", "grouping", "group", "row_subjects", "column_subjects"]
        table = tables.read(folder, "similarity", names)
        widths = pc.list_value_length(table["column_subjects"]).to_pylist()
        heights = pc.list_value_length(table["row_subjects"]).to_pylist()
        ids = pc.unique(pc.list_flatten(table["row_subjects"]))
        groupings, groups = table["grouping"].to_pylist(), table["group"].to_pylist()
        where = np.full((3, max(groupings, default=-1) + 1, len(ids)), -1, dtype=np.int32)
        tiles, start = {}, 0
        for row, tile_id in enumerate(table["tile_id"].to_pylist()):
            i, j = map(int, tile_id.split("/")[-2:])
            tiles[groupings[row], groups[row], i, j] = (start, widths[row])
            start += heights[row] * widths[row]
            if j == 0:
                members = pc.index_in(table["row_subjects"][row].values, value_set=ids).to_numpy()
                where[0, groupings[row], members] = groups[row]
                where[1, groupings[row], members] = i
                where[2, groupings[row], members] = np.arange(len(members))
        require_tiles(folder, tiles)
        return cls(ids, where[0], where[1], where[2], tiles, cosines)

    def between(self, grouping: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Cosines [R, C] float32 of subjects of one group of `grouping`."""
        block, position = self.blocks[grouping], self.positions[grouping]
        values = np.empty((len(rows), len(columns)), dtype=np.float32)
        for i in np.unique(block[rows]):
            for j in np.unique(block[columns]):
                start, width = self.tiles[grouping, int(self.groups[grouping, rows[0]]), int(i), int(j)]
                down, across = np.flatnonzero(block[rows] == i), np.flatnonzero(block[columns] == j)
                at = start + position[rows[down]].astype(np.int64)[:, None] * width + position[columns[across]]
                values[np.ix_(down, across)] = self.cosines[at]
        return values


def require_tiles(folder: Path, tiles: Collection[tuple[int, int, int, int]]) -> None:
    """Raise UserError naming the first tile missing from a group, which would otherwise stop a run midway.

    A group has one tile per pair of its row blocks, (grouping, group, row block, column block).
    """
    last: dict[tuple[int, int], int] = {}
    for grouping, group, i, j in tiles:
        last[grouping, group] = max(last.get((grouping, group), 0), i, j)
    for (grouping, group), blocks in last.items():
        for i, j in itertools.product(range(blocks + 1), repeat=2):
            if (grouping, group, i, j) not in tiles:
                name = f"{grouping:02d}/{group:05d}/{i:03d}/{j:03d}"
                raise UserError(f"{folder / 'similarity'}: tile '{name}' is missing; run similarity again")
