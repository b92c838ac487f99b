"""Each format is opened again as its reader does: by the library where it is installed, and by its documentation."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from model.images.segment import square_crop
from pipelines import tables
from pipelines.export.formats import FORMATS
from runtime.errors import UserError
from tests.world.exports import ANGLE, SMALL
from tests.world.photos import blocks

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


@pytest.mark.parametrize("name", ["webdataset", "imagefolder", "parquet", "ominicontrol"])
def test_datasets_library_reads_it_by_the_card(name, export, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    options = {"reference": "whole"} if name == "ominicontrol" else {}
    out = export(name, validation=0.5, **options)
    found = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 4, "validation": 7}
    row = found["validation"][1]
    assert (row["json"]["text"] if name == "webdataset" else row["text"]) == "a mug, view 1"
    assert row["target.jpg" if name == "webdataset" else "image"].height == (48 if name == "ominicontrol" else 32)


def test_parquet_has_images_and_column_types(export):
    out = export("parquet", fields=ALL)
    files = sorted((out / "data").glob("train-*.parquet"))
    assert [pq.read_metadata(file).num_rows for file in files] == [3, 3, 3, 2]
    schema = pq.read_schema(files[0])
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    images = [name for name, feature in features.items() if feature == {"_type": "Image"}]
    assert images == ["image", "reference", "target_mask", "reference_mask"]
    assert features["angle"] == {"dtype": "float32", "_type": "Value"}
    assert features["target_box"]["feature"] == {"dtype": "int32", "_type": "Value"}
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert [row["text"] for row in rows[3:6]] == ["a cup, view 3", "a mug, view 0", "a mug, view 1"]
    assert rows[0]["angle"] is None and rows[5]["angle"] == ANGLE
    assert rows[5]["image"]["path"] == "00000005.target.jpg"
    assert opened(rows[5]["target_mask"]["bytes"]).getbbox() == tuple(rows[5]["target_box"])


@pytest.mark.parametrize("views", [1, 2])
def test_ai_toolkit_finds_captions_controls_and_masks_by_name(views, export):
    out = export("ai-toolkit", views=views, fields=ALL, reference="alpha", validation=0.5)
    (entry,) = yaml.safe_load((out / "dataset.yaml").read_text())["datasets"]
    controls = entry["control_path"] if views == 2 else [entry["control_path"]]
    assert len(controls) == views and entry["caption_ext"] == "txt"
    targets = sorted(file for file in (out / entry["folder_path"]).rglob("*") if file.suffix == ".jpg")
    assert len(targets) == 4 and len(list((out / "validation" / "targets").glob("*.jpg"))) == 7
    for target in targets:
        assert target.with_suffix(".txt").read_text().startswith("a cup, view")
        for control in controls:
            found = [file for file in (out / control).iterdir() if file.stem == target.stem]
            assert [opened(file).mode for file in found] == ["RGBA"]
        mask = out / entry["mask_path"] / f"{target.stem}.png"
        assert opened(mask).size == opened(target).size


def test_simpletuner_pairs_files_of_the_same_path_in_both_datasets(export):
    out = export("simpletuner", views=2, fields=ALL, encoding="png", validation=0.5)
    backends = {entry["id"]: entry for entry in json.loads((out / "multidatabackend.json").read_text())}
    assert backends["text-embeds"]["default"] and len({b.get("cache_dir_vae") for b in backends.values()}) == 9
    for split, kind, count in (("train", "image", 4), ("validation", "eval", 7)):
        targets = backends[f"{split}-targets"]
        assert (targets["dataset_type"], targets["caption_strategy"]) == (kind, "textfile")
        here = out / targets["instance_data_dir"]
        images = {file.relative_to(here) for file in here.rglob("*.png")}
        assert len(images) == count
        assert {file.relative_to(here).with_suffix(".png") for file in here.rglob("*.txt")} == images
        kinds = []
        for name in targets["conditioning_data"]:
            other = backends[name]
            there = out / other["instance_data_dir"]
            assert {file.relative_to(there) for file in there.rglob("*") if file.is_file()} == images
            assert (other["dataset_type"], other["source_dataset_id"]) == ("conditioning", f"{split}-targets")
            kinds.append(other["conditioning_type"])
        assert kinds == ["reference_loose", "reference_loose", "mask"]


@pytest.mark.parametrize("views", [1, 2])
def test_uno_opens_images_beside_its_list(views, export):
    out = export("uno", views=views, validation=0.5, reference="alpha")
    for split, count in (("train", 4), ("validation", 7)):
        rows = json.loads((out / f"{split}.json").read_text(encoding="utf-8"))
        assert len(rows) == count
        for row in rows:
            assert len(row["image_paths"]) == views and row["prompt"] == row["text"]
            for path in (row["image_tgt_path"], *row["image_paths"]):
                assert opened(out / path).size == (32, 32)
    corner = opened(out / rows[0]["image_paths"][0]).convert("RGB").getpixel((0, 0))
    assert corner == (255, 255, 255)  # its reader drops transparency


def test_ominicontrol_cuts_both_views_out_of_an_image(export):
    out = export("ominicontrol", reference="whole", encoding="png")
    rows = [row for file in sorted((out / "data").glob("train-*")) for row in pq.read_table(file).to_pylist()]
    assert len(rows) == PAIRS
    row, side, padding = rows[5], 32, 8
    assert row["collection"] == "s" and set(row["quality_assessment"].values()) == {5}
    assert row["description"]["description_0"] == "a mug, view 1"
    assert row["description"]["description_1"] == "a mug, view 2"
    image = opened(row["image"]["bytes"])
    assert image.size == (2 * side + 3 * padding, side + 2 * padding)
    left = image.crop((padding, padding, side + padding, side + padding))
    right = image.crop((side + 2 * padding, padding, 2 * side + 2 * padding, side + padding))
    for view, found in ((1, left), (2, right)):
        pixels = np.zeros((72, 96), dtype=bool)
        pixels[10:60, 20 + 4 * view : 50 + 4 * view] = True
        assert found.tobytes() == square_crop(blocks(10 + view, 96, 72), pixels, side)[0].tobytes()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("simpletuner", {"fields": ("mask",)}, "masks are PNG and targets jpeg; give --encoding png"),
        ("simpletuner", {"reference": "alpha"}, "transparent references are PNG and targets jpeg; give --encoding png"),
        ("uno", {"fields": ("mask",)}, "UNO reads no masks; leave mask out of --with"),
        ("ominicontrol", {}, "trains on either view of a pair as the target; give --reference whole"),
        ("ominicontrol", {"reference": "whole", "crop": "none"}, "squares of one size; give --crop square"),
        ("ominicontrol", {"reference": "whole", "views": 2}, "has two views in a pair; give --views 1"),
        ("ominicontrol", {"reference": "whole", "fields": ("mask",)}, "OminiControl reads no masks"),
    ],
)
def test_what_a_trainer_cannot_read_is_refused_before_anything_is_written(name, options, said, export, tmp_path):
    with pytest.raises(UserError, match=said):
        export(name, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_holder_of_every_pair_is_a_file_and_nothing_names_this_machine(name, export, tmp_path):
    options = {"reference": "whole"} if name == "ominicontrol" else {}
    out = export(name, validation=0.5, **options)
    rows = list(tables.rows(tmp_path / "data" / "export-pairs", "exports"))
    assert len(rows) == PAIRS and all((out / row["file"]).is_file() for row in rows)
    for file in out.rglob("*"):
        assert not (file.is_file() and str(tmp_path).encode() in file.read_bytes()), file
    assert FORMATS[name].reads(("train",), SMALL) in (out / "README.md").read_text(encoding="utf-8")
