"""The table and the sheet of what sharing S+ over steps does."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from experiments import sharing
from runtime.errors import UserError


def test_table_and_sheet(tmp_path, capsys):
    out = tmp_path / "new" / "sheet.png"
    sharing.main(["--subjects", "1", "--steps", "3", "--every", "3", "--repeats", "1", "--out", str(out)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == ["text_every", "1", "3", "another seed"]
    itself, shared, seed = (float(row[-1]) for row in rows[1:])
    assert itself == 0 < shared < seed
    assert Image.open(out).size == (2 * 64 * sharing.ZOOM, 64 * sharing.ZOOM + sharing.HEAD)


def test_difference_is_in_8_bit_levels():
    black = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    assert sharing.difference(black, black) == 0
    assert sharing.difference(black, black + 200) == 200


def test_bad_options_are_one_sentence():
    with pytest.raises(UserError, match="must be at least 1"):
        sharing.main(["--steps", "0"])
