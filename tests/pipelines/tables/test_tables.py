"""Tables come back as they were written, and what is not a table says what is wrong with it."""

import re
import string
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import tables
from pipelines.tables import TABLES, TableError
from runtime.closure import ROOT

FINITE_HALVES = st.builds(
    lambda bits, sign: sign * float(np.uint16(bits).view(np.float16)), st.integers(0, 0x7BFF), st.sampled_from([1, -1])
)
SCALARS = {
    pa.string(): st.text(max_size=12),
    pa.binary(): st.binary(max_size=12),
    pa.binary(32): st.binary(min_size=32, max_size=32),
    pa.bool_(): st.booleans(),
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.uint8(): st.integers(0, 255),
    pa.float32(): st.floats(width=32, allow_nan=False),
    pa.float16(): FINITE_HALVES,
}
IDS = st.text(alphabet=string.ascii_lowercase + "/- .~é", max_size=8)


def values(column: tables.Column) -> st.SearchStrategy:
    """Values of a column's type; None too where it may be null."""
    if pa.types.is_fixed_size_list(column.type):
        size = column.type.list_size
        found = st.lists(SCALARS[column.type.value_type], min_size=size, max_size=size)
    elif pa.types.is_list(column.type):
        found = st.lists(SCALARS[column.type.value_type], max_size=5)
    else:
        found = SCALARS[column.type]
    return found | st.none() if column.nullable else found


def rows_of(name: str) -> st.SearchStrategy:
    """Rows of a table, unique in its keys."""
    spec = TABLES[name]
    cells = {key: values(column) for key, column in spec.columns.items()}
    cells |= {key: IDS for key in spec.keys if spec.columns[key].type == pa.string()}
    return st.lists(st.fixed_dictionaries(cells), max_size=5, unique_by=lambda row: tuple(row[k] for k in spec.keys))


def some_row(name: str) -> dict:
    """A row with plain values."""
    plain = {pa.string(): "a/b", pa.binary(): b"x", pa.binary(32): bytes(32), pa.bool_(): True}
    row = {}
    for key, column in TABLES[name].columns.items():
        size = getattr(column.type, "list_size", 2)
        nested = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
        kind = column.type.value_type if nested else column.type
        row[key] = [plain.get(kind, 1)] * size if nested else plain.get(kind, 1)
    return row


@pytest.mark.parametrize("name", TABLES)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_table_comes_back_as_written_and_the_same_rows_are_the_same_bytes(name, data, tmp_path):
    rows = data.draw(rows_of(name))
    table = tables.from_rows(name, rows)
    tables.write(tmp_path, name, table)
    back = tables.read(tmp_path, name)
    assert back.equals(table)
    assert list(tables.rows(tmp_path, name)) == back.to_pylist()
    by_keys = {tuple(row[key] for key in TABLES[name].keys): row for row in back.to_pylist()}
    assert by_keys == {tuple(row[key] for key in TABLES[name].keys): row for row in rows}
    part = tmp_path / name / "part-00000.parquet"
    first = part.read_bytes()
    shuffled = data.draw(st.permutations(rows))
    tables.write(tmp_path, name, tables.from_rows(name, shuffled))
    assert part.read_bytes() == first


def test_bytes_do_not_depend_on_how_a_table_was_put_together(tmp_path):
    """Rows of one shard come item by item or all at once."""
    rng = np.random.default_rng(0)
    rows = [some_row("features") | {"frame_id": f"a/{n:04d}", "hidden": rng.random(300)} for n in range(5000)]
    whole = tables.from_rows("features", rows)
    pieces = pa.concat_tables([whole.slice(start, 7) for start in range(0, 5000, 7)])
    tables.write_part(tmp_path / "whole", "features", whole)
    tables.write_part(tmp_path / "pieces", "features", pieces)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes()


def test_ids_sort_part_by_part():
    """`a/b-2` is another subject than `a/b`, and comes after all of its frames, though `-` comes before `/`."""
    ids = ["a/b-2/0", "a/b/1", "a/b", "a/b/0", "a-c/0", "a/b/10", "a"]
    rows = [some_row("embeddings") | {"frame_id": i} for i in ids]
    ordered = tables.from_rows("embeddings", rows)["frame_id"].to_pylist()
    assert ordered == ["a", "a/b", "a/b/0", "a/b/1", "a/b/10", "a/b-2/0", "a-c/0"]


def test_numbers_in_keys_sort_as_numbers():
    rows = [some_row("features") | {"frame_id": "a", "augmentation": n} for n in (10, 2, 0)]
    assert tables.from_rows("features", rows)["augmentation"].to_pylist() == [0, 2, 10]


def wrong_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """By what is wrong: a file in the place of a masks table, and what the error must name."""
    good = tables.from_rows("masks", [some_row("masks")])
    area = good.schema.get_field_index("area")
    nullable = pa.field("area", pa.float32())
    variants = {
        "column missing": (good.drop_columns(["area"]), "column 'area' is missing"),
        "column of another type": (
            good.set_column(area, "area", pa.array([1.0], pa.float64())),
            "column 'area' is double, expected float",
        ),
        "column unknown": (good.append_column("extra", pa.array([1])), "unknown column 'extra'"),
        "nulls": (good.set_column(area, nullable, pa.array([None], pa.float32())), "column 'area' has nulls"),
    }
    made = {}
    for number, (what, (table, message)) in enumerate(variants.items()):
        file = folder / str(number) / "masks" / "part-00000.parquet"
        file.parent.mkdir(parents=True)
        pq.write_table(table, file)
        made[what] = (file, message)
    tables.write(folder / "whole", "masks", good)
    whole = (folder / "whole" / "masks" / "part-00000.parquet").read_bytes()
    for what, data in {"cut short": whole[:-100], "not Parquet": b"frame_id,area\n" * 9, "no bytes": b""}.items():
        file = folder / what / "masks" / "part-00000.parquet"
        file.parent.mkdir(parents=True)
        file.write_bytes(data)
        made[what] = (file, "is not a readable Parquet file")
    return made


@pytest.mark.parametrize(
    "what",
    ["column missing", "column of another type", "column unknown", "nulls", "cut short", "not Parquet", "no bytes"],
)
def test_file_that_is_not_its_table_is_named_with_its_column(what, tmp_path):
    file, message = wrong_files(tmp_path)[what]
    with pytest.raises(TableError, match=re.escape(message)) as caught:
        tables.read(file.parent.parent, "masks")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_nulls_are_found_in_a_read_of_some_columns_too(tmp_path):
    file, message = wrong_files(tmp_path)["nulls"]
    assert tables.read(file.parent.parent, "masks", ["frame_id"]).num_rows == 1
    with pytest.raises(TableError, match=message):
        list(tables.rows(file.parent.parent, "masks", ["frame_id", "area"]))


def test_missing_table_names_the_stage_that_writes_it(tmp_path):
    with pytest.raises(TableError, match=r"curate/frames holds no table 'frames'; .* \(curate\) first"):
        tables.read(tmp_path / "curate", "frames")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"area": None}, "column 'area' has nulls"),
        ({"area": "large"}, "large"),
        ({"height": 2**40}, "."),
        ({"colour": 1}, "lacks or adds the columns colour"),
    ],
)
def test_row_that_does_not_fit_is_refused_before_it_is_written(change, message):
    with pytest.raises(TableError, match=message) as caught:
        tables.from_rows("masks", [some_row("masks") | change])
    assert "table masks" in str(caught.value)


def test_row_that_lacks_a_column_is_refused():
    row = some_row("masks")
    del row["rle"]
    with pytest.raises(TableError, match="lacks or adds the columns rle"):
        tables.from_rows("masks", [row])


def test_write_replaces_all_parts_and_leaves_no_temporary_file(tmp_path):
    for number in range(3):
        tables.write_part(tmp_path / "masks" / f"part-0000{number}.parquet", "masks", tables.from_rows("masks", []))
    tables.write(tmp_path, "masks", tables.from_rows("masks", [some_row("masks")]))
    assert [file.name for file in (tmp_path / "masks").iterdir()] == ["part-00000.parquet"]
    assert tables.read(tmp_path, "masks").num_rows == 1


def test_every_column_says_what_it_means_in_the_file(tmp_path):
    for name, spec in TABLES.items():
        tables.write(tmp_path, name, tables.from_rows(name, []))
        schema = pq.read_schema(tables.parts(tmp_path, name)[0])
        assert [schema.field(key).metadata[b"meaning"].decode() for key in spec.columns] == [
            column.meaning for column in spec.columns.values()
        ]


def test_reject_reasons_are_a_closed_list():
    assert tables.reject("a/b", "mask", "mask_empty") == {
        "id": "a/b",
        "stage": "mask",
        "reason": "mask_empty",
        "detail": "",
        "source": None,
        "path": None,
        "box": None,
    }
    box = tables.reject("a/b", "curate", "subject_cut", "3 sides", "s", "b.jpg", (0, 0, 1, 1))
    assert (box["source"], box["path"], box["box"]) == ("s", "b.jpg", [0, 0, 1, 1])
    with pytest.raises(KeyError, match="'too_ugly' is not in REJECT_REASONS"):
        tables.reject("a/b", "mask", "too_ugly")


def test_every_reason_in_the_code_is_in_the_list_and_every_one_of_the_list_is_in_the_code():
    folder = ROOT / "pipelines"
    files = [file for file in folder.rglob("*.py") if file.name != "rejects.py" and "toybox" not in file.parts]
    files.append(ROOT / "model" / "images" / "decode.py")
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    used = set(re.findall(r'(?:reject=|DecodeError\(|\], "(?:mask|curate)", )"(\w+)"', code))
    assert used <= tables.REJECT_REASONS.keys()
    assert {reason for reason in tables.REJECT_REASONS if f'"{reason}"' not in code} == set()


def test_stream_of_tables_becomes_few_parts_and_reads_back_in_pieces(tmp_path, monkeypatch):
    rejects = [tables.reject(f"s/{n:02d}", "curate", "blurred") for n in range(33)]
    chunks = [tables.from_rows("rejects", rejects[at : at + 4]) for at in range(0, 33, 4)]
    monkeypatch.setattr(tables.files, "PART_BYTES", 3 * chunks[0].nbytes)
    assert tables.write_parts(tmp_path, "rejects", iter(chunks)) == 33
    assert [pq.read_metadata(part).num_rows for part in tables.parts(tmp_path, "rejects")] == [12, 12, 9]
    assert list(tables.rows(tmp_path, "rejects")) == rejects
    pieces = list(tables.stream(tmp_path, "rejects", ["id"], size=5))
    assert max(piece.num_rows for piece in pieces) == 5
    assert pa.concat_tables(pieces)["id"].to_pylist() == [row["id"] for row in rejects]
    assert tables.write_parts(tmp_path, "rejects", iter([])) == 0
    assert tables.read(tmp_path, "rejects").num_rows == 0
