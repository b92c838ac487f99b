"""The promises of the engine, kept with a stage that only makes up numbers."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import tables
from pipelines.engine import actors, cluster, driver
from pipelines.engine.actors import find_poison
from pipelines.engine.items import Item, Key, Spool, cut
from pipelines.engine.shards import Index, Shard, bounded, stored_rows
from pipelines.engine.work import WorkFolder
from runtime.closure import ROOT
from runtime.digest import digest, digest_files
from runtime.errors import ModelError, UserError
from tests.world import shard_workers
from tests.world.shard_workers import SHARD_ITEMS, counts, folder_bytes, item, on_cpus, some_items
from tests.world.tables import embedding

COUNT = 24


@pytest.fixture(scope="module")
def reference(ray_started, tmp_path_factory) -> Path:
    """Folder of a finished run over `some_items(COUNT)` with one worker: work, trace and out."""
    folder = tmp_path_factory.mktemp("reference")
    summary = shard_workers.run(some_items(COUNT), on_cpus(folder / "work"), folder / "out", folder / "trace")
    assert summary.items_computed == COUNT and summary.shards > 3
    driver.report("count", summary, folder / "out")
    return folder


def shard_of(items: list[Item], subject_id: str) -> list[str]:
    """Ids of the items in one shard with `subject_id`."""
    pieces = cut(items, SHARD_ITEMS)
    return next([i.id for i in shard] for shard in pieces if any(i.id == subject_id for i in shard))


def rejected(out: Path, reason: str) -> list[str]:
    return [row["id"] for row in tables.rows(out, "rejects") if row["reason"] == reason]


def test_tables_are_the_same_bytes_for_two_workers_and_shuffled_items(reference, run_params, tmp_path):
    items = some_items(COUNT)
    random.Random(1).shuffle(items)
    summary = shard_workers.run(items, run_params(workers=2), tmp_path / "out", tmp_path / "trace")
    driver.report("count", summary, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(reference / "out")


def test_every_photo_is_in_the_kept_table_or_rejected_and_rows_are_in_path_order(reference):
    kept = [row["frame_id"] for row in tables.rows(reference / "out", "embeddings")]
    dropped = rejected(reference / "out", "blurred")
    assert dropped and kept
    assert sorted(kept + dropped) == [frame for i in some_items(COUNT) for frame in i.frame_ids]
    assert kept == sorted(kept, key=tables.path_order)


def test_killed_driver_resumes_to_the_same_bytes_and_recomputes_only_what_is_missing(reference, run_params, tmp_path):
    """Meanwhile a second run says who holds the lock."""
    stuck = f"set/{COUNT // 2:02d}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    fates = json.dumps({COUNT // 2: str(tmp_path / "gate")})
    command = [sys.executable, "-m", shard_workers.__name__, str(tmp_path), str(COUNT), fates]
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        trace = tmp_path / "trace"
        deadline = time.monotonic() + 120
        while not (trace / stuck.replace("/", "_")).exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(UserError, match=f"already being run by process {process.pid} on "):
            shard_workers.run(some_items(COUNT), run_params(), tmp_path / "out", trace)
        assert not (tmp_path / "out").exists()
        process.send_signal(signal.SIGKILL)
    (tmp_path / "gate").touch()
    before = counts(trace)
    summary = shard_workers.run(some_items(COUNT), run_params(), tmp_path / "out", trace)
    again = {subject for subject, count in counts(trace).items() if count > 1}
    assert 0 < summary.shards_done_before < summary.shards
    assert again <= set(shard_of(some_items(COUNT), stuck))
    assert summary.items_computed == COUNT - len(before) + len(again)
    driver.report("count", summary, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(reference / "out")


def test_finished_run_repeated_computes_nothing_and_needs_no_worker(reference, run_params, monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "connect", None)
    run = run_params(work=reference / "work")
    summary = shard_workers.run(some_items(COUNT), run, tmp_path / "out", reference / "trace")
    assert (summary.items_computed, summary.shards_done_before) == (0, summary.shards)
    written = {name: data for name, data in folder_bytes(reference / "out").items() if name.endswith(".parquet")}
    assert folder_bytes(tmp_path / "out") == written


def test_new_and_changed_items_cost_only_themselves_and_other_params_share_nothing(reference, run_params, tmp_path):
    """Rows taken from earlier shards make the same bytes as rows computed afresh."""
    run, trace = run_params(work=reference / "work"), tmp_path / "trace"
    items = [*some_items(COUNT), item("set/07-new")]
    items[15] = item("set/15", seed=1)
    assert len(shard_of(items, "set/07-new")) > 1
    summary = shard_workers.run(items, run, tmp_path / "grown", trace)
    assert counts(trace) == {"set/07-new": 1, "set/15": 1}
    assert summary.items_computed == 2
    assert summary.shards - summary.shards_done_before == 2
    other = shard_workers.run(items, run, tmp_path / "other", tmp_path / "trace2", identity="other params")
    assert other.items_computed == len(items) and other.shards_done_before == 0
    assert folder_bytes(tmp_path / "other") == folder_bytes(tmp_path / "grown")


@pytest.mark.parametrize(("fate", "crashed"), [("die:1", ["set/09/1"]), ("die", ["set/09/0", "set/09/1", "set/09/2"])])
def test_poisonous_photo_becomes_a_crashed_reject_and_all_others_are_kept(
    reference, run_params, tmp_path, fate, crashed
):
    """Where each of a subject's photos is, all of them."""
    poisoned = some_items(COUNT, {9: fate})
    assert len(shard_of(poisoned, "set/09")) > 2
    summary = shard_workers.run(poisoned, run_params(workers=2), tmp_path / "out", tmp_path / "trace")
    driver.report("count", summary, tmp_path / "out")
    assert rejected(tmp_path / "out", "crashed") == crashed
    for table in ("embeddings", "features"):
        expected = [row for row in tables.rows(reference / "out", table) if row["frame_id"] not in crashed]
        assert list(tables.rows(tmp_path / "out", table)) == expected
    again = shard_workers.run(poisoned, run_params(), tmp_path / "out", tmp_path / "trace")
    assert again.items_computed == 0


def test_poison_is_looked_for_when_no_other_worker_holds_a_place(reference, run_params, tmp_path, monkeypatch):
    """A probe needs a worker's place: beside workers that wait for its answer it might get none."""
    poisoned, search, computed = some_items(COUNT, {9: "die:1"}), find_poison, []

    def after_the_others(*arguments) -> dict[str, set[str]]:
        computed.append(set(counts(tmp_path / "trace")))
        return search(*arguments)

    monkeypatch.setattr(actors, "find_poison", after_the_others)
    shard_workers.run(poisoned, run_params(), tmp_path / "out", tmp_path / "trace")
    assert rejected(tmp_path / "out", "crashed") == ["set/09/1"]
    assert len(computed) == 1
    assert computed[0] >= {one.id for one in poisoned} - set(shard_of(poisoned, "set/09"))


@pytest.mark.parametrize("count", [1, 2])
def test_worker_that_dies_on_everything_ends_with_one_sentence(ray_started, run_params, tmp_path, count):
    """One photo alone may be poison; a worker that dies before it sees one, or on each of several, is at fault."""
    single = count == 1
    items = some_items(count, {} if single else dict.fromkeys(range(count), "die"))
    with pytest.raises(UserError, match="a worker died 3 times on one shard") as caught:
        shard_workers.run(items, run_params(restarts=2), tmp_path / "out", tmp_path / "trace", dies_at_birth=single)
    assert "\n" not in str(caught.value)


def test_error_of_a_worker_comes_as_itself_and_finished_shards_are_kept(ray_started, run_params, tmp_path):
    last = COUNT - 1
    for fate, kind, message in (
        ("user_error", UserError, "photo 7 is upside down; turn it"),
        ("model_error", ModelError, "weights/nothing is missing; fetch it"),
    ):
        with pytest.raises(kind) as caught:
            shard_workers.run(some_items(COUNT, {last: fate}), run_params(), tmp_path / "out", tmp_path / "trace")
        assert type(caught.value) is kind and str(caught.value) == message
    summary = shard_workers.run(some_items(COUNT), run_params(), tmp_path / "out", tmp_path / "trace")
    assert summary.shards_done_before == summary.shards - 1
    in_the_last_shard = shard_of(some_items(COUNT), f"set/{last:02d}")
    assert all(count == 1 for subject, count in counts(tmp_path / "trace").items() if subject not in in_the_last_shard)


def test_what_a_killed_run_left_half_written_does_no_harm(reference, run_params, tmp_path):
    work = tmp_path / "work" / "count" / digest("count", "params")
    for folder in (work / ".0123456789abcdef.99.tmp", work / ".fedcba9876543210.98.tmp"):
        folder.mkdir(parents=True)
        (folder / "embeddings.parquet").write_bytes(b"PAR1")
    (folder / "items.json").write_text('{"tables": ["embed')
    half = tmp_path / "out" / ".embeddings.tmp"
    half.mkdir(parents=True)
    (half / "part-00009.parquet").write_bytes(b"PAR1")
    summary = shard_workers.run(some_items(COUNT), run_params(), tmp_path / "out", tmp_path / "trace")
    driver.report("count", summary, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(reference / "out")
    assert not list(work.glob(".*.tmp"))


# Threads that come and go while a driver waits: the exporter of metrics makes one for each export.
EXPORTS = """
import os, time
from pipelines.engine import cluster
from tests.world.shard_workers import on_cpus
assert cluster.connect(on_cpus(".work"))
time.sleep(2)
usual, new, end = set(os.listdir("/proc/self/task")), set(), time.monotonic() + 3
while time.monotonic() < end:
    new |= set(os.listdir("/proc/self/task")) - usual
print(len(new))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are read from /proc")
@pytest.mark.parametrize("metrics", ["0", "1"])
def test_driver_exports_no_metrics(metrics, monkeypatch):
    for name in ("RAY_enable_metrics_collection", "RAY_enable_open_telemetry"):
        monkeypatch.delenv(name, raising=False)
        if metrics == "1":
            monkeypatch.setenv(name, metrics)
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "100")
    done = subprocess.run([sys.executable, "-c", EXPORTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (int(done.stdout.splitlines()[-1]) > 0) == (metrics == "1")


def test_ray_listens_on_loopback_only_and_a_running_one_is_left_alone(ray_started, run_params):
    import ray

    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
    assert cluster.connect(run_params()) is False


def test_workers_are_as_important_as_whoever_started_them(ray_started):
    import ray

    assert ray.get(ray.remote(num_cpus=0)(lambda: os.nice(0)).remote()) == os.nice(0)


def test_lost_photo_is_an_error_that_counts(tmp_path):
    summary = driver.Summary(input=4, kept=2, rejects={"blurred": 1})
    with pytest.raises(RuntimeError, match=r"2 kept \+ 1 rejected != 4"):
        driver.report("count", summary, tmp_path)
    assert not list(tmp_path.iterdir())


def test_report_names_reasons_on_the_terminal_and_writes_nothing_that_differs(tmp_path, capsys):
    for seconds in (1.0, 2.0):
        summary = driver.Summary(input=4, kept=3, rejects={"blurred": 1}, shards=2, seconds=seconds)
        driver.report("count", summary, tmp_path / str(seconds))
    assert "1 blurred: sharpness is below" in capsys.readouterr().out
    assert folder_bytes(tmp_path / "1.0") == folder_bytes(tmp_path / "2.0")


def some_embedding(number: int, width: int) -> dict:
    noise = random.Random(number)
    return embedding(f"s/{number:03d}", [noise.random() for _ in range(width)])


def test_large_shards_are_linked_and_small_ones_joined_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(tables.files, "PART_BYTES", 20_000)
    work = WorkFolder(str(tmp_path / "work"))
    widths = [8, 8, 20_000, 20_000, 8, 8, 4000, 4000, 4000, 8]
    for number, width in enumerate(widths):
        with work.writing(f"{number}") as folder:
            table = tables.from_rows("embeddings", [some_embedding(number, width)])
            tables.write_part(folder / "embeddings.parquet", "embeddings", table)
            (folder / "items.json").touch()
    sizes = {shard: files["embeddings.parquet"] for shard, files in sorted(work.sizes().items())}
    driver._gather(tmp_path / "out", "embeddings", work, sizes)
    parts = tables.parts(tmp_path / "out", "embeddings")
    numbers = [[int(row[2:]) for row in tables.read_part(part, "embeddings")["frame_id"].to_pylist()] for part in parts]
    assert numbers == [[0, 1], [2], [3], [4, 5, 6], [7], [8, 9]]
    linked = {number: part.stat().st_ino for part, (number, *_) in zip(parts, numbers, strict=True)}
    files = {number: tmp_path / "work" / f"{number}" / "embeddings.parquet" for number in (2, 3, 7)}
    assert {number: file.stat().st_ino for number, file in files.items()}.items() <= linked.items()


def test_no_shards_make_an_empty_table_and_old_parts_are_gone(tmp_path):
    (tmp_path / "rejects").mkdir()
    (tmp_path / "rejects" / "part-00007.parquet").write_bytes(b"old")
    driver._gather(tmp_path, "rejects", WorkFolder(str(tmp_path / "work")), {})
    assert tables.read(tmp_path, "rejects").num_rows == 0
    assert [part.name for part in tables.parts(tmp_path, "rejects")] == ["part-00000.parquet"]


def test_digest_tells_values_and_files_apart(tmp_path):
    assert digest("a", "b") != digest("ab")
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")
    first = digest_files(folder)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.pyc").write_bytes(b"1")
    assert digest_files(folder) == first
    (folder / "a").rename(folder / "b")
    assert digest_files(folder) != first


names = st.lists(st.integers(0, 5000), unique=True, min_size=1, max_size=120)


@given(names, st.integers(1, 12))
def test_shards_hold_all_items_in_order_and_are_bounded(numbers, mean):
    items = [item(f"s/{number:04d}") for number in sorted(numbers)]
    pieces = cut(items, mean)
    assert [i for shard in pieces for i in shard] == items
    assert all(1 <= len(shard) <= 4 * mean for shard in pieces)


def test_shards_are_as_large_as_asked_on_average():
    pieces = cut([item(f"s/{number:05d}") for number in range(8000)], 16)
    assert 12 < 8000 / len(pieces) < 20


@given(names, st.integers(0, 5000), st.integers(1, 12))
def test_new_item_leaves_all_shards_as_they_are_but_those_up_to_the_next_boundary(numbers, new, mean):
    """A boundary is where an id's hash ends a shard; only the size limit makes more than one shard between two."""
    old = [item(f"s/{number:04d}") for number in sorted(set(numbers) - {new})]
    added = item(f"s/{new:04d}")
    grown = sorted([*old, added], key=lambda i: i.id)
    ends = [i.id for i in old if int(digest(i.id), 16) % mean == 0]
    low = max((end for end in ends if end < added.id), default="")
    high = min((end for end in ends if end > added.id), default="t")
    before = {tuple(i.id for i in shard) for shard in cut(old, mean)}
    changed = [shard for shard in cut(grown, mean) if tuple(i.id for i in shard) not in before]
    assert changed
    assert all(low < i.id <= high for shard in changed for i in shard)
    if len(changed) > 2:
        assert any(len(shard) == 4 * mean for shard in changed)


def test_index_of_rows_survives_tables_of_any_length(tmp_path):
    """An item without rows in a table does not shift those of its neighbours."""
    keys = Spool(some_items(3), tmp_path).keys
    shard = Shard(tuple(keys), ("embeddings", "rejects"))
    results = [
        {"embeddings": [some_embedding(1, 8), some_embedding(2, 8)]},
        {"rejects": [tables.reject("set/01/0", "count", "empty")]},
        {"embeddings": [some_embedding(3, 8)]},
    ]
    work = WorkFolder(str(tmp_path / "work"))
    shard.save(work, results)
    assert list(work.sizes()) == [shard.name]
    index = Index(work, [shard.name])
    found = stored_rows(work, index.places(keys))
    for key, result in zip(keys, results, strict=True):
        for name in shard.names:
            assert found[key.id][name].equals(tables.from_rows(name, result.get(name, [])))
    changed = keys[0]._replace(fingerprint="other")
    assert changed not in index and index.places([changed]) == {}


def test_driver_reads_no_rows_of_earlier_shards(reference, run_params, tmp_path, monkeypatch):
    """They may take more memory than it has; workers read them."""
    grown = [*some_items(COUNT), item("set/08-new")]
    assert len(shard_of(grown, "set/08-new")) > 1

    def read(*_) -> None:
        raise AssertionError("the driver reads rows")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "_gather", lambda *_: None)  # which reads to join small shards, a part at a time
        patch.setattr(driver, "settle", lambda *_: None)
        patch.setattr(WorkFolder, "table", read)
        summary = shard_workers.run(grown, run_params(work=reference / "work"), tmp_path / "out", tmp_path / "trace")
    assert summary.items_computed == 1
    assert counts(tmp_path / "trace") == {"set/08-new": 1}


def test_cut_is_bounded_by_photos_and_leaves_items_whole(tmp_path):
    keys = [Key(f"s/{number}", "", photos, 0) for number, photos in enumerate((3, 3, 1, 9, 2))]
    photos = [[key.photos for key in piece] for piece in bounded(keys, 6)]
    assert photos == [[3, 3], [1], [9], [2]]
    assert bounded(keys, None) == [keys]


def test_stage_makes_more_shards_where_photos_are_many(tmp_path, run_params, monkeypatch):
    made = []
    monkeypatch.setattr(actors, "compute", lambda stage, missing, *_: made.extend(missing))
    monkeypatch.setattr(driver, "_gather", lambda *_: None)
    monkeypatch.setattr(driver, "settle", lambda *_: None)
    monkeypatch.setattr(
        WorkFolder, "sizes", lambda self, names: {shard.name: {f"{n}.parquet": 1 for n in names} for shard in made}
    )
    where = {"out": tmp_path / "out", "run": run_params()}
    common = {"identity": "x", "kept": "frames", "others": [], "shard_items": COUNT, "shard_photos": 6}
    with driver.sole_writer("count", **where):
        driver.run_stage("count", some_items(COUNT), None, **where, **common)
    assert made and all(len(shard.keys) <= 2 for shard in made)


def saved_shard(work: WorkFolder, folder: Path) -> Shard:
    """A finished shard of one item with a reject."""
    shard = Shard(tuple(Spool(some_items(1), folder).keys), ("embeddings", "rejects"))
    shard.save(work, [{"rejects": [tables.reject("set/00/0", "count", "empty")]}])
    return shard


@pytest.mark.parametrize("lost", ["items.json", "rejects.parquet"])
def test_shard_that_was_removed_by_half_is_missing_and_written_again(lost, tmp_path):
    work = WorkFolder(str(tmp_path / "work"))
    shard = saved_shard(work, tmp_path)
    whole = folder_bytes(tmp_path / "work")
    (tmp_path / "work" / shard.name / lost).unlink()
    assert work.sizes(shard.names) == {}
    saved_shard(work, tmp_path)
    assert folder_bytes(tmp_path / "work") == whole and list(work.sizes(shard.names)) == [shard.name]


def test_shard_that_another_run_has_finished_stays(tmp_path):
    work = WorkFolder(str(tmp_path / "work"))
    shard = saved_shard(work, tmp_path)
    file = tmp_path / "work" / shard.name / "rejects.parquet"
    before = file.stat().st_ino
    saved_shard(work, tmp_path)
    assert file.stat().st_ino == before and [path.name for path in (tmp_path / "work").iterdir()] == [shard.name]


def test_shard_that_cannot_take_its_place_is_an_error(tmp_path, monkeypatch):
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "refused")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError, match="refused"):
        saved_shard(WorkFolder(str(tmp_path / "work")), tmp_path)


def test_spooled_items_come_back_whole_and_in_path_order(tmp_path):
    items = [item(name, seed=number) for number, name in enumerate(("s/b", "s/a/1", "s/a", "s-1/a"))]
    spool = Spool((one for one in items), tmp_path)
    assert [key.id for key in spool.keys] == ["s/a", "s/a/1", "s/b", "s-1/a"]
    assert sorted(map(spool.read, spool.keys), key=items.index) == items
    assert not list(tmp_path.iterdir())
