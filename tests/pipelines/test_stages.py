"""The data stages one after another, on a world of four subjects."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines import tables
from pipelines.curate import stage as curate
from pipelines.encode import stage as encode
from pipelines.engine import cluster, driver
from pipelines.mask import stage as mask
from pipelines.pairs import stage as pairs
from pipelines.similarity import stage as similarity
from pipelines.similarity.tiles import prototypes
from pipelines.toybox.stage import ToyboxParams, write_world
from runtime.cli import guarded
from runtime.closure import ROOT
from runtime.errors import UserError
from runtime.lock import exclusive
from runtime.params import Params
from tests.world.shard_workers import folder_bytes

STAGES = {"curate": curate, "mask": mask, "similarity": similarity, "pairs": pairs, "encode": encode}
SUBJECTS, VIEWS, SINGLES = 3, 4, 1


class World(NamedTuple):
    """A toybox world and the settings that make it the source of every stage."""

    root: Path
    settings: list[str]


@pytest.fixture(scope="module")
def world(section, tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("world") / "toybox"
    sizes = {"mvimgnet_subjects": SUBJECTS, "mvimgnet_views": VIEWS, "openimages_photos": SINGLES}
    write_world(root, section("toybox", ToyboxParams, **sizes, dreambench_subjects=1, dreambench_photos=1))
    sources = [
        {"name": "views", "layout": "mvimgnet", "root": str(root / "mvimgnet"), "split": "train"},
        {"name": "single", "layout": "openimages", "root": str(root / "openimages"), "split": "train"},
        {"name": "bench", "layout": "dreambench", "root": str(root / "dreambench"), "split": "test"},
    ]
    sharded = [f"{stage}.shard_subjects=2" for stage in STAGES if stage != "pairs"]
    more = ["run.device=cpu", "mask.method=annotated", "mask.compare=0.3"]
    return World(root, [f"sources={json.dumps(sources)}", *sharded, *more])


def read(data: Path, *settings: str) -> Params:
    """The repository's params with these settings, tables in `data` and the work folder beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return Params.read(settings=[f"run.work={data / 'work'}", *settings], data=str(data))


def run_here(stage: ModuleType, params: Params) -> None:
    """Run a stage in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        stage.main(params)


def run_command(stage: str, params: Params, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"pipelines.{stage}", *params.words()]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def tables_of_one_worker(ray_started, world, tmp_path_factory) -> Path:
    """The data folder after all stages with one worker."""
    data = tmp_path_factory.mktemp("one")
    for stage in STAGES.values():
        run_here(stage, read(data, *world.settings, "run.workers=1"))
    return data


def test_two_workers_write_the_same_bytes_as_one(tables_of_one_worker, world, tmp_path):
    """The second run starts as a command that joins a running cluster."""
    import ray

    params = read(tmp_path, *world.settings, "run.workers=2")
    done = run_command("curate", params, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    assert done.returncode == 0, done.stderr
    assert f"curate: {SUBJECTS * VIEWS + SINGLES + 1} of" in done.stdout
    for name in ("mask", "similarity", "pairs", "encode"):
        run_here(STAGES[name], params)
    for name in STAGES:
        assert folder_bytes(tmp_path / name) == folder_bytes(tables_of_one_worker / name), name
        assert not list((tmp_path / name).glob(".*"))


def test_tables_of_all_stages_fit_together(tables_of_one_worker):
    data = tables_of_one_worker
    frames = list(tables.rows(data / "curate", "frames"))
    triplets = list(tables.rows(data / "pairs", "triplets"))
    masks = list(tables.rows(data / "mask", "masks"))
    assert len(frames) == SUBJECTS * VIEWS + SINGLES + 1
    assert [row["frame_id"] for row in masks] == [row["frame_id"] for row in frames]
    usable = {row["frame_id"] for row in masks if row["quality"] == "ok"}
    assert {row["frame_id"] for row in tables.rows(data / "similarity", "embeddings")} == usable
    (tile,) = tables.rows(data / "similarity", "similarity")
    assert set(tile["row_subjects"]) == {f["subject_id"] for f in frames if f["frame_id"] in usable}
    targets = {row["target"] for row in triplets}
    assert targets and {row["frame_id"] for row in tables.rows(data / "encode", "latents")} == targets
    inputs = {row[role] for row in triplets for role in ("reference", "positive", "target")}
    assert inputs <= usable
    features = list(tables.rows(data / "encode", "features", ["frame_id", "augmentation"]))
    assert {row["frame_id"] for row in features} == inputs and len(features) == 3 * len(inputs)
    nearest = list(tables.rows(data / "similarity", "neighbours"))
    assert [row["subject_id"] for row in nearest] == tile["row_subjects"]
    assert all(len(row["neighbours"]) == len(nearest) - 1 for row in nearest)
    assert {row["method"] for row in triplets} == {"pose", "augment"}
    assert not any(row["subject_id"].startswith("bench/") for row in triplets)
    assert tables.read(data / "curate", "prompts").num_rows == 25


def test_masks_shipped_with_the_world_come_through_unchanged(tables_of_one_worker, world):
    from pipelines.photos.decode import decode_mask_image
    from pipelines.photos.roots import Root

    shipped = {row["frame_id"]: row["mask_path"] for row in tables.rows(tables_of_one_worker / "curate", "frames")}
    root = Root(str(world.root / "mvimgnet"))
    compared = 0
    for row in tables.rows(tables_of_one_worker / "mask", "masks"):
        if row["frame_id"].startswith("views/"):
            truth = decode_mask_image(root.read(shipped[row["frame_id"]]))
            found = tables.decode_mask(row["rle"], row["height"], row["width"])
            assert (found & truth).sum() >= 0.98 * (found | truth).sum()
            compared += 1
    assert compared == SUBJECTS * VIEWS


def test_masks_made_both_ways_are_compared(tables_of_one_worker):
    rows = list(tables.rows(tables_of_one_worker / "mask", "agreement"))
    told = json.loads((tables_of_one_worker / "mask" / "metrics.json").read_text())["agreement"]
    assert told["photos"] == len(rows) > 0
    assert told["both"] == sum(row["iou"] is not None for row in rows)
    for row in rows:
        pair = [
            row[name] and tables.decode_mask(row[name], row["height"], row["width"]) for name in ("annotated", "found")
        ]
        assert row["iou"] is None or row["iou"] == pytest.approx((pair[0] & pair[1]).sum() / (pair[0] | pair[1]).sum())


def test_metrics_count_every_photo_and_nothing_that_differs_from_run_to_run(tables_of_one_worker):
    for stage in STAGES:
        folder = tables_of_one_worker / stage
        metrics, summary = (json.loads((folder / f"{file}.json").read_text()) for file in ("metrics", "summary"))
        assert summary["input"] == summary["kept"] + summary["rejected"] > 0
        assert sum(metrics["not_usable" if stage == "pairs" else "reasons"].values()) == summary["rejected"]
        assert not {"seconds", "rate", "date"} & (metrics.keys() | summary.keys())


def sentence(run: Callable[[], None], capsys) -> str:
    """What a command says that ends with exit code 1: one sentence on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        guarded(run)
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said
    return said


@pytest.fixture
def without_photos(monkeypatch, tmp_path) -> list[str]:
    """Settings of stages that find no photos in `tmp_path`; nothing is handed to a worker."""

    def empty_tables(stage: str, _items: object, _worker: object, **given: object) -> driver.Summary:
        with pytest.raises(UserError, match="already being run"), exclusive(stage, tmp_path / "work"):
            pass
        for name in (given["kept"], "rejects", *given["others"]):
            tables.write(given["out"], name, tables.from_rows(name, []))
        return driver.Summary()

    monkeypatch.setattr(driver, "run_stage", empty_tables)
    for table in ("curate/frames", "mask/masks", "similarity/rejects", "pairs/triplets"):
        folder, name = table.split("/")
        tables.write(tmp_path / folder, name, tables.from_rows(name, []))
    return ["sources=[]", "run.device=cpu", "similarity.same_subject=0.9"]


def last_step(name: str) -> tuple[ModuleType, str]:
    """Where the function lies by which a stage writes its metrics: the engine's, or that of `pairs` itself."""
    return (pairs, "write_metrics") if name == "pairs" else (driver, "report")


@pytest.mark.parametrize("name", STAGES)
def test_stage_is_the_only_writer_until_its_metrics_are_written(name, without_photos, monkeypatch, tmp_path):
    module, function = last_step(name)
    write, said = getattr(module, function), []

    def refused(*arguments: object) -> None:
        with pytest.raises(UserError) as caught, exclusive(name, tmp_path / "work"):
            pass
        said.append(str(caught.value))
        write(*arguments)

    monkeypatch.setattr(module, function, refused)
    run_here(STAGES[name], read(tmp_path, *without_photos))
    assert len(said) == 1 and f"stage {name} is already being run by process {os.getpid()}" in said[0]
    with exclusive(name, tmp_path / "work"):
        assert (tmp_path / name / "metrics.json").exists()


@pytest.mark.parametrize("name", STAGES)
def test_disk_that_is_full_after_the_shards_is_one_sentence(name, without_photos, monkeypatch, capsys, tmp_path):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*last_step(name), full)
    said = sentence(lambda: run_here(STAGES[name], read(tmp_path, *without_photos)), capsys)
    assert f"no space left on the disk of {tmp_path / name}" in said


def test_curate_reserves_no_gpu_and_no_decoders_that_it_does_not_use(without_photos, monkeypatch, tmp_path):
    given, empty_tables = [], driver.run_stage

    def see(*arguments: object, **named: object) -> driver.Summary:
        given.append(named["run"])
        return empty_tables(*arguments, **named)

    monkeypatch.setattr(driver, "run_stage", see)
    more = ("run.device=cuda", "run.gpus_per_worker=1.0", "run.threads=2", "run.decoders=8")
    run_here(curate, read(tmp_path, *without_photos, *more))
    (run,) = given
    assert cluster.reservation(run, run.torch_device()) == {"num_cpus": 2, "num_gpus": 0}


@pytest.mark.slow
def test_missing_root_folder_ends_a_command_with_one_sentence(world, tmp_path):
    missing = json.dumps([{"name": "own", "layout": "folder", "root": "no/photos", "split": "train"}])
    done = run_command("curate", read(tmp_path, f"sources={missing}"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: folder 'no/photos' does not exist; ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("curate.min_vews=3", "unknown key 'curate.min_vews'"),
        ("curate.min_views=many", "'curate.min_views' is 'many'"),
        ("curate.filters.brightness=[1]", "'curate.filters.brightness"),
        ("sources=[{name: own, layout: pile, root: x, split: train}]", "'sources.0.layout' is 'pile'"),
        ("sources=[{name: own, layout: folder, root: x}]", "'sources.0.split' is missing"),
        ("run.workers", "write KEY=VALUE"),
    ],
)
def test_wrong_setting_is_named_in_one_sentence(setting, message, capsys, tmp_path):
    said = sentence(lambda: run_here(curate, read(tmp_path, setting)), capsys)
    assert message in said


def test_wrong_table_and_missing_table_are_named_with_file_and_column(tables_of_one_worker, world, capsys, tmp_path):
    params = read(tmp_path, *world.settings)
    assert "holds no table 'frames'" in sentence(lambda: run_here(mask, params), capsys)
    assert "holds no table 'frames'" in sentence(lambda: run_here(similarity, params), capsys)
    assert "holds no table 'rejects'" in sentence(lambda: run_here(pairs, params), capsys)
    assert "holds no table 'masks'" in sentence(lambda: run_here(encode, params), capsys)
    frames = tables.read(tables_of_one_worker / "curate", "frames")
    part = tmp_path / "curate" / "frames" / "part-00000.parquet"
    part.parent.mkdir(parents=True)
    pq.write_table(frames.drop_columns(["sha256"]), part)
    assert f"{part}: column 'sha256' is missing" in sentence(lambda: run_here(mask, params), capsys)
    part.write_bytes(b"")
    assert f"{part} is not a readable Parquet file" in sentence(lambda: run_here(mask, params), capsys)


def test_missing_weights_are_named_in_one_sentence(tables_of_one_worker, world, capsys, tmp_path):
    variant = json.loads((ROOT / "model" / "backbones" / "toybox.json").read_text())
    variant["image_encoder"]["path"] = "weights/nowhere"
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(variant))
    more = (f"backbones.variant={file}", f"run.work={tmp_path / 'work'}")
    params = read(tables_of_one_worker, *world.settings, *more)
    before = folder_bytes(tables_of_one_worker / "encode")
    assert "weights/nowhere" in sentence(lambda: run_here(encode, params), capsys)
    assert folder_bytes(tables_of_one_worker / "encode") == before


def test_hidden_states_above_the_budget_are_left_out_and_every_photo_is_still_counted(
    tables_of_one_worker, world, capsys, tmp_path
):
    for stage in ("curate", "mask", "pairs"):
        shutil.copytree(tables_of_one_worker / stage, tmp_path / stage)
    run_here(encode, read(tmp_path, *world.settings, "encode.max_gigabytes=0.00001"))
    assert "left out: more than encode.max_gigabytes" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "encode" / "metrics.json").read_text())
    assert metrics["features"] == 0 and metrics["latents"] == metrics["kept"] == metrics["input"] > 0
    assert folder_bytes(tmp_path / "encode" / "latents") == folder_bytes(tables_of_one_worker / "encode" / "latents")


def test_similarity_tile_is_the_cosines_of_the_prototypes(tables_of_one_worker):
    ids, vectors = prototypes(tables_of_one_worker / "similarity")
    (tile,) = tables.rows(tables_of_one_worker / "similarity", "similarity")
    assert tile["row_subjects"] == ids
    values = np.array(tile["values"]).reshape(len(ids), len(ids))
    assert values == pytest.approx(vectors @ vectors.T, abs=1e-3)
