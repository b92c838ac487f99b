"""`customcontrast show`: rows of a table for people."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines import tables
from pipelines.tables import show
from runtime.cli import Parser
from runtime.errors import UserError


def shown(data: Path, *words: str) -> None:
    parser = Parser()
    show.arguments(parser)
    show.main(parser.parse_args([*words, "--data", str(data)]))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"frame_id": f"s/{n}", "subject_id": "s" if n else "t", "encoder": "clip", "vector": np.arange(20.0) / 3}
        for n in range(4)
    ]
    tables.write(tmp_path / "similarity", "embeddings", tables.from_rows("embeddings", rows))
    for stage in ("curate", "mask"):
        reject = tables.reject("s/9", stage, "blurred", "3.2")
        tables.write(tmp_path / stage, "rejects", tables.from_rows("rejects", [reject]))
    return tmp_path


def test_without_a_name_every_table_is_listed_with_its_rows(data: Path, capsys):
    shown(data)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [["curate/rejects", "1"], ["mask/rejects", "1"], ["similarity/embeddings", "4"]]


def test_rows_are_printed_field_by_field_with_long_values_cut(data: Path, capsys):
    shown(data, "embeddings", "--rows", "1", "--skip", "1")
    text = capsys.readouterr().out
    assert "s/1" in text and "[0, 0.3333, 0.6665, ... 20 values]" in text
    assert "1 of the 4 rows of similarity/embeddings" in text


def test_rows_are_chosen_by_a_value_and_columns_make_a_table(data: Path, capsys):
    shown(data, "embeddings", "--where", "subject_id=t", "--columns", "frame_id,encoder")
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["frame_id", "encoder"], ["s/0", "clip"]]


def test_meaning_is_that_of_the_schema(data: Path, capsys):
    shown(data, "mask/rejects", "--meaning", "--columns", "reason")
    assert "a key of REJECT_REASONS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["embedings"], "holds no table 'embedings', did you mean 'embeddings'"),
        (["rejects"], "name one of curate/rejects, mask/rejects"),
        (["embeddings", "--columns", "frame"], "no column 'frame', did you mean 'frame_id'"),
        (["embeddings", "--where", "subject_id"], "write COLUMN=VALUE"),
        (["embeddings", "--where", "subjct_id=s"], "no column 'subjct_id', did you mean 'subject_id'"),
        (["embeddings", "--rows", "0"], "rows must be at least 1"),
    ],
)
def test_what_is_not_there_is_one_sentence(data: Path, words: list[str], said: str):
    with pytest.raises(UserError, match=said) as error:
        shown(data, *words)
    assert "\n" not in str(error.value)


def test_folder_without_tables_is_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="holds no table; run a stage first"):
        shown(tmp_path)
