"""Forgetting a subject: nothing below the data and the work folder names it afterwards, and others keep their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines import tables
from pipelines.engine.items import Key
from pipelines.engine.shards import Shard
from pipelines.engine.work import WorkFolder
from pipelines.forget import command
from pipelines.selfaugment.people import NamedPerson
from runtime.cli import Parser
from runtime.closure import ROOT
from runtime.errors import UserError
from runtime.lock import exclusive
from tests.world.tables import embedding, frame, mask, triplet, write

ANNA, ANNABEL, BERT = "s/woman/anna", "s/woman/annabel", "s/man/bert"
"""Annabel's id begins with Anna's."""
ADA = NamedPerson("Name True", "").id
SUBJECTS = (ANNA, ANNABEL, BERT)


def filled(name: str, /, **columns: Any) -> dict[str, Any]:
    """A row of a table with these columns, and something in the others."""
    row: dict[str, Any] = {}
    for column, spec in tables.spec(name).columns.items():
        kind = str(spec.type)
        row[column] = None if spec.nullable else "" if kind == "string" else b"" if kind == "binary" else 0
    return row | columns


@pytest.fixture
def data(tmp_path: Path, monkeypatch) -> Path:
    """Tables of three subjects, with all ways in which a table names one."""
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "data"
    ids = [f"{subject}/{number}" for subject in SUBJECTS for number in range(2)]
    write(folder / "curate", "frames", [frame(i, path=f"{i}.jpg") for i in ids])
    write(folder / "curate", "rejects", [tables.reject(f"{subject}/9", "curate", "blurred") for subject in SUBJECTS])
    write(folder / "mask", "masks", [mask(i) for i in ids])
    write(folder / "similarity", "embeddings", [embedding(i, [1.0, 0.0]) for i in ids])
    others = {subject: [other for other in SUBJECTS if other != subject] for subject in SUBJECTS}
    near = [{"subject_id": s, "neighbours": others[s], "cosines": [0.5, 0.25]} for s in SUBJECTS]
    write(folder / "similarity", "neighbours", near)
    tile = {"tile_id": "0/0/0/0", "grouping": 0, "group": 0, "row_subjects": SUBJECTS, "column_subjects": SUBJECTS[:2]}
    write(folder / "similarity", "similarity", [tile | {"values": [float(n) for n in range(6)]}])
    write(folder / "pairs", "triplets", [triplet(f"{s}/000", f"{s}/0", f"{s}/1", f"{s}/1") for s in SUBJECTS])
    pictures = [
        filled("generations", method="m", subject_id=s, class_name="woman", group="pair", partner=p)
        for s, p in ((ANNABEL, ANNA), (ANNA, ANNABEL), (BERT, None))
    ]
    write(folder / "generate", "generations", pictures)
    return folder


def forget(data: Path, *subjects: str, work: Path | None = None, more: tuple[str, ...] = ()) -> None:
    parser = Parser()
    command.arguments(parser)
    words = [*subjects, "--data", str(data), "--set", f"run.work={work or data.parent / 'work'}", *more]
    command.main(parser.parse_args(words))


def everything(folder: Path) -> str:
    """All that is readable below a folder, and the names of its files."""
    found = []
    for file in sorted(folder.rglob("*")):
        found.append(str(file.relative_to(folder)))
        if file.suffix == ".parquet":
            found.append(str(pq.read_table(file).to_pylist()))
        elif file.is_file():
            found.append(file.read_bytes().decode("utf-8", "replace"))
    return "\n".join(found)


def test_no_table_names_the_subject_and_others_keep_their_rows(data, capsys):
    before = {s: everything(data).count(s) for s in SUBJECTS}
    frames = tables.read(data / "curate", "frames").to_pylist()
    forget(data, ANNA)
    said = capsys.readouterr().out
    assert ANNA not in everything(data).replace(ANNABEL, "")
    kept = tables.read(data / "curate", "frames").to_pylist()
    assert kept == [row for row in frames if row["subject_id"] != ANNA]
    near = {row["subject_id"]: row for row in tables.rows(data / "similarity", "neighbours")}
    assert near[BERT]["neighbours"] == [ANNABEL] and list(near[BERT]["cosines"]) == [0.25]
    assert near[ANNABEL]["neighbours"] == [BERT] and list(near[ANNABEL]["cosines"]) == [0.25]
    (tile,) = tables.rows(data / "similarity", "similarity")
    assert tile["row_subjects"] == [ANNABEL, BERT] and tile["column_subjects"] == [ANNABEL]
    assert list(tile["values"]) == [3.0, 5.0]
    assert [row["subject_id"] for row in tables.rows(data / "generate", "generations")] == [BERT]
    assert everything(data).count(BERT) == before[BERT] - 1  # as Anna's neighbour
    assert f"table {data / 'curate' / 'frames'}, 2 rows" in said
    assert f"not deleted: 2 photos of {ANNA} in {ANNA} of source s; delete them" in said


def test_finished_work_and_what_holds_several_subjects_is_deleted(data, tmp_path, capsys):
    work = WorkFolder(str(tmp_path / "work"), "mask", "abc")
    shards = []
    for subject in (ANNA, BERT):
        shard = Shard((Key(subject, "f", 1, 0),), ("masks", "rejects"))
        shard.save(work, [{"masks": [mask(f"{subject}/0")], "rejects": []}])
        shards.append(shard.name)
    task = tmp_path / "work" / "generate" / "abc"
    row = filled("generations", method="m", group="style")
    for number, subject in enumerate((ANNA, BERT)):
        tables.write_part(
            task / f"{number}.parquet", "generations", tables.from_rows("generations", [row | {"subject_id": subject}])
        )
    for place in ("work/train/arrays/x/hidden.npy", "work/train/y/samples/step-1.png", "data/report/index.html"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text("both")
    views = data / "views" / "map.csv"
    views.parent.mkdir()
    views.write_text(f"subject_id,x\n{ANNA},1\n{ANNABEL},2\n")
    (data / "train" / "adapter").mkdir(parents=True)
    (data / "train" / "adapter" / "adapter.json").write_text("{}")
    forget(data, ANNA)
    said = capsys.readouterr().out
    assert work.sizes().keys() == {shards[1]}
    assert [file.name for file in sorted(task.iterdir())] == ["1.parquet"]
    assert views.read_text() == f"subject_id,x\n{ANNABEL},2\n"
    assert ANNA not in everything(tmp_path).replace(ANNABEL, "") and "both" not in everything(tmp_path)
    assert f"what adapters learned: {data / 'train' / 'adapter'}; delete those" in said


@pytest.mark.parametrize("asked", [f"made/{ADA}", ADA, "Name True"])
def test_pictures_of_a_person_whose_name_the_base_model_knew_go_with_their_listing(data, capsys, asked):
    folder = data / "selfaugment"
    for person in (ADA, "2c3d2c3d2c3d"):
        image = folder / "generated" / "train" / "images" / person / "plain-00-0.png"
        image.parent.mkdir(parents=True)
        image.write_bytes(b"png")
    listing = folder / "generated" / "train" / "pictures.csv"
    rows = [f"images/{person}/plain-00-0.png,woman,train,reference" for person in (ADA, "2c3d2c3d2c3d")]
    listing.write_text("\n".join(["path,noun,split,role", *rows, ""]))
    write(
        folder,
        "people",
        [filled("people", person=p, name=f"Name {p == ADA}", known=True) for p in (ADA, "2c3d2c3d2c3d")],
    )
    write(
        folder,
        "pictures",
        [
            filled("pictures", frame_id=f"{p}/x", person=p, path=f"train/images/{p}/x.png")
            for p in (ADA, "2c3d2c3d2c3d")
        ],
    )
    write(data / "encode", "latents", [filled("latents", frame_id=f"made/{ADA}/x", latent=[], subject_mask=[])])
    forget(data, asked)
    assert ADA not in everything(data) and "2c3d2c3d2c3d" in everything(folder)
    assert listing.read_text().splitlines() == ["path,noun,split,role", rows[1]]
    assert f"generated/train/images/{ADA}" in capsys.readouterr().out


def test_killed_it_is_run_again_and_the_frames_go_last(data, monkeypatch, capsys):
    kept, whole = [], tables.write_part

    def dies(file: Path, name: str, table: Any) -> None:
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(name)
        whole(file, name, table)

    monkeypatch.setattr(tables, "write_part", dies)
    with pytest.raises(KeyboardInterrupt):
        forget(data, ANNA)
    assert "frames" not in kept
    monkeypatch.setattr(tables, "write_part", whole)
    forget(data, ANNA)
    assert ANNA not in everything(data).replace(ANNABEL, "")
    assert "2 photos of" in capsys.readouterr().out


def test_exports_that_are_named_are_deleted_as_a_whole_and_others_are_told(data, tmp_path, capsys):
    row = filled("exports", split="train", subject_id=ANNA, triplet_id=f"{ANNA}/000")
    write(data / "export-pairs", "exports", [row])
    out = tmp_path / "pairs"
    out.mkdir()
    with pytest.raises(UserError, match="is no folder that export-pairs wrote"):
        forget(data, ANNA, more=("--export", str(out)))
    (out / ".export.json").write_text(json.dumps({"export": "x"}))
    forget(data, ANNABEL)
    assert "name each folder with --export" in capsys.readouterr().out and out.is_dir()
    forget(data, ANNA, more=("--export", str(out)))
    assert not out.exists() and "name each folder" not in capsys.readouterr().out


def test_an_unknown_subject_and_a_running_stage_are_one_sentence(data, tmp_path, capsys):
    with pytest.raises(UserError, match="names s/woman/ann; customcontrast show frames"):
        forget(data, "s/woman/ann")
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    with exclusive("mask", work), pytest.raises(UserError, match="mask"):
        forget(data, ANNA)
    assert ANNA in everything(data)
