"""Each format is opened again as its reader does: by the library where it is installed, and by its documentation."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.world.exports import ANGLE

PAIRS = 11
ALL = ("mask", "box", "angle", "quality", "licence")


def samples(file: Path) -> list[dict[str, bytes]]:
    """The samples of a WebDataset shard: runs of members that share what is before the first dot."""
    found: list[dict[str, bytes]] = []
    with tarfile.open(file) as tar:
        for member in tar:
            key, _, ending = member.name.partition(".")
            if not found or found[-1]["__key__"] != key.encode():
                found.append({"__key__": key.encode()})
            stream = tar.extractfile(member)
            assert stream is not None and (member.mtime, member.uid, member.uname) == (0, 0, "")
            found[-1][ending] = stream.read()
    return found


def opened(data: bytes | Path) -> Image.Image:
    image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    image.load()
    return image


def test_webdataset_shards_have_the_files_of_each_pair_in_a_row(export):
    out = export("webdataset", fields=ALL, views=2, reference="alpha")
    shards = sorted(out.glob("train-*.tar"))
    assert [len(samples(shard)) for shard in shards] == [3, 3, 3, 2]
    found = [sample for shard in shards for sample in samples(shard)]
    assert [sample["__key__"] for sample in found] == [f"{n:08d}".encode() for n in range(PAIRS)]
    masks = {"target_mask.png", "reference_mask.png", "positive_mask.png"}
    for sample in found:
        assert sample.keys() == {"__key__", "target.jpg", "reference.png", "positive.png", *masks, "txt", "json"}
    record = json.loads(found[5]["json"])
    assert found[5]["txt"].decode() == record["text"] == "a mug, view 1" and record["angle"] == ANGLE
    assert opened(found[5]["target.jpg"]).size == (32, 32)
    left, top, right, bottom = record["target_box"]
    assert opened(found[5]["target_mask.png"]).getbbox() == (left, top, right, bottom)
    assert opened(found[5]["reference.png"]).mode == "RGBA"


def test_webdataset_library_reads_it(export):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    shards = [str(shard) for shard in sorted(export("webdataset").glob("train-*.tar"))]
    found = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert len(found) == PAIRS and found[5]["json"]["text"] == found[5]["txt"] == "a mug, view 1"
    assert found[5]["target.jpg"].size == found[5]["reference.jpg"].size == (32, 32)


def test_imagefolder_index_names_every_image_and_has_no_null(export):
    out = export("imagefolder", fields=ALL, validation=0.5)
    named = set()
    for split, count in (("train", 4), ("validation", 7)):
        lines = (out / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        rows: list[dict[str, Any]] = [json.loads(text) for text in lines]
        assert len(rows) == count
        for row in rows:
            assert None not in row.values() and list(row) == list(rows[0])
            assert {type(value) for value in (row["angle"], row["target_mask_score"])} == {float}
            files = {name: value for name, value in row.items() if name.endswith("file_name")}
            assert list(files) == [
                "file_name",
                *(f"{r}_file_name" for r in ("reference", "target_mask", "reference_mask")),
            ]
            assert {opened(out / split / file).size for file in files.values()} == {(32, 32)}
            named |= {out / split / file for file in files.values()}
        assert {row["angle"] for row in rows} == {-1.0 if split == "train" else ANGLE}
        assert {row["text"].split(",")[0] for row in rows} == {"a cup" if split == "train" else "a mug"}
    images = {file for file in out.rglob("*") if file.suffix in (".jpg", ".png")} - {out / "examples.jpg"}
    assert named == images


@pytest.mark.parametrize("name", ["webdataset", "imagefolder"])
def test_datasets_library_reads_it_by_the_card(name, export, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    found = datasets.load_dataset(str(export(name, validation=0.5)), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 4, "validation": 7}
    row = found["validation"][1]
    assert (row["json"]["text"] if name == "webdataset" else row["text"]) == "a mug, view 1"
