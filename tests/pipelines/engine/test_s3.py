"""Photos and the work folder on S3-compatible storage, against a server on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipelines import tables
from pipelines.curate.stage import items_of
from pipelines.curate.worker import CurateParams, CurateWorker
from pipelines.engine.items import Spool
from pipelines.engine.shards import Shard
from pipelines.engine.work import WorkFolder
from pipelines.photos.roots import Root, SourceParams
from runtime.closure import ROOT
from runtime.errors import UserError
from tests.world import shard_workers
from tests.world.shard_workers import folder_bytes, some_items

s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed; it is the extra s3 and in the group dev")
server = pytest.importorskip("moto.server", reason="moto[server] is not installed; it is in the group dev")

COUNT = 24


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a bucket on a server of the test's own, known by the variables that every S3 client reads."""
    serving = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    serving.start()
    host, port = serving.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
        s3fs.S3FileSystem.clear_instance_cache()
    serving.stop()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos of two subjects in the `folder` layout, and a file that is none."""
    folder = tmp_path / "photos"
    for subject in ("mug/red", "cup/blue"):
        (folder / subject).mkdir(parents=True)
        for view in range(3):
            noise = Image.effect_noise((96, 96), 60 + 20 * view).convert("RGB")
            noise.save(folder / subject / f"{view}.png")
    (folder / "mug" / "red" / "9.png").write_bytes(b"no image")
    return folder


def source(root: str) -> SourceParams:
    return SourceParams(name="own", layout="folder", root=root, split="train")


def test_photos_give_the_same_rows_as_from_a_disk(bucket: str, photos: Path, section):
    s3fs.S3FileSystem().put(str(photos), "bucket/photos", recursive=True)
    params = section("curate", CurateParams)
    found = []
    for root in (str(photos), f"{bucket}/photos"):
        items = sorted(items_of(source(root), 24), key=lambda item: item.id)
        worker = CurateWorker(params, [source(root)], "cpu")
        found.append(([i.frame_ids for i in items], worker.compute([i.payload for i in items])))
    assert found[0] == found[1]
    assert sum(len(rows["frames"]) for rows in found[1][1]) == 6
    assert [row["reason"] for rows in found[1][1] for row in rows["rejects"]] == ["unreadable"]


def test_changed_photo_changes_the_fingerprint_of_its_subject_only(bucket: str, photos: Path):
    remote = s3fs.S3FileSystem()
    remote.put(str(photos), "bucket/changing", recursive=True)
    before = {item.id: item.fingerprint for item in items_of(source(f"{bucket}/changing"), 24)}
    remote.pipe_file("bucket/changing/mug/red/0.png", b"another picture")
    s3fs.S3FileSystem.clear_instance_cache()  # a later run is another process
    after = {item.id: item.fingerprint for item in items_of(source(f"{bucket}/changing"), 24)}
    assert {name for name in before if before[name] != after[name]} == {"own/mug/red"}


def test_bucket_that_is_not_there_is_named_in_one_sentence(bucket: str):
    with pytest.raises(UserError, match="s3://nowhere/photos"):
        Root("s3://nowhere/photos")


def test_shard_is_there_when_all_of_it_is(bucket: str, tmp_path: Path):
    keys = tuple(Spool(some_items(2), tmp_path).keys)
    shard = Shard(keys, ("rejects",))
    rows = [{"rejects": [tables.reject(f"{key.id}/0", "count", "empty")]} for key in keys]
    remote, local = WorkFolder(f"{bucket}/work", "count", "x"), WorkFolder(str(tmp_path / "work"), "count", "x")
    assert remote.sizes() == {}
    with pytest.raises(ZeroDivisionError), remote.writing("half") as folder:
        (folder / "items.json").touch()
        raise ZeroDivisionError
    s3fs.S3FileSystem().pipe_file("bucket/work/count/x/half/rejects.parquet", b"PAR1")
    for work in (remote, local):
        shard.save(work, rows)
    assert remote.sizes() == local.sizes()
    assert remote.record(shard.name) == local.record(shard.name)
    assert remote.table(shard.name, "rejects").equals(local.table(shard.name, "rejects"))
    for number, work in enumerate((remote, local)):
        work.fetch(shard.name, "rejects", tmp_path / f"{number}.parquet")
    assert (tmp_path / "0.parquet").read_bytes() == (tmp_path / "1.parquet").read_bytes()


@pytest.mark.slow
def test_stage_with_its_work_folder_there_writes_the_same_bytes_and_goes_on(bucket: str, tmp_path: Path):
    """No folder is shared by driver and workers but the bucket."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = []
    for name, work in (("local", str(tmp_path / "w")), ("remote", f"{bucket}/shared"), ("again", f"{bucket}/shared")):
        command = [sys.executable, "-m", shard_workers.__name__, str(tmp_path / name), str(COUNT), "{}", "2", work]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    (tmp_path / "remote" / "out" / "count.lock").unlink()
    assert folder_bytes(tmp_path / "remote" / "out") == folder_bytes(tmp_path / "local" / "out")
    assert ", 0 done before" in said[1] and ", 0 done before" not in said[2]
    assert not list((tmp_path / "again" / "trace").iterdir())
