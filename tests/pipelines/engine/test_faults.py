"""What can go wrong while a stage runs, with real Ray: the next run ends with the bytes of an undisturbed one.

`FAULT_SEED=7 pytest ...` repeats the random choices of a failed test, which prints its seed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from pipelines import tables
from pipelines.curate.stage import items_of
from pipelines.curate.worker import CurateParams, CurateWorker
from pipelines.engine import driver
from pipelines.photos.roots import SourceParams
from runtime.closure import ROOT
from runtime.errors import UserError
from runtime.params import RunParams
from tests.world import shard_workers
from tests.world.shard_workers import SHARD_ITEMS, counts, folder_bytes, on_cpus, some_items

RAY = Path(sys.executable).with_name("ray")
SUBMIT = [sys.executable, str(ROOT / "customcontrast.py"), "submit"]
COUNT = 24
PATIENCE = 300  # seconds, for a machine that has other work; a test takes a few


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """The random choices of a test, printed with a failure."""
    seed = os.environ.get("FAULT_SEED") or str(random.SystemRandom().randrange(10**6))
    print(f"FAULT_SEED={seed}")
    return random.Random(seed + request.node.name)


@pytest.fixture(scope="module")
def undisturbed(ray_started: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = on_cpus(folder / "work", workers=2)
    summary = shard_workers.run(some_items(COUNT), run, folder / "out", folder / "trace")
    driver.report("count", summary, folder / "out")
    return folder_bytes(folder / "out")


@pytest.fixture
def driver_process(ray_started: None, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`driver_process({3: "gate"})`: starts the stage in a process of its own, on the Ray that is running."""
    import ray

    started: list[subprocess.Popen[str]] = []

    def start(fates: dict[int, str], workers: int = 1, module: str = shard_workers.__name__) -> subprocess.Popen[str]:
        fates = {number: str(tmp_path / fate) for number, fate in fates.items()}
        command = [sys.executable, "-m", module, str(tmp_path), str(COUNT), json.dumps(fates), str(workers)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        if process.stderr and not process.stderr.closed:  # closed where the test has read it
            process.communicate()


def waiting(folder: Path, count: int = 1) -> list[int]:
    """Process ids of workers that wait at the gate, when there are so many."""
    deadline = time.monotonic() + PATIENCE
    while len(found := list(folder.glob("gate.*.pid"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(file.name.split(".")[1]) for file in found]


def run_again(folder: Path, run: RunParams) -> driver.Summary:
    """Run the stage in this process, on what a disturbed run left in `folder`."""
    summary = shard_workers.run(some_items(COUNT), run, folder / "out", folder / "trace")
    driver.report("count", summary, folder / "out")
    return summary


def litter(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.endswith(".tmp")]


def test_driver_killed_at_a_random_shard(undisturbed, driver_process, run_params, tmp_path, chance):
    process = driver_process({chance.randrange(COUNT): "gate"})
    waiting(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = counts(tmp_path / "trace")
    (tmp_path / "gate").touch()
    summary = run_again(tmp_path, run_params(workers=2))
    assert folder_bytes(tmp_path / "out") == undisturbed
    assert summary.items_computed >= COUNT - len(before)
    assert sum(counts(tmp_path / "trace").values()) <= COUNT + 4 * SHARD_ITEMS, "only the shard at hand is done again"
    assert not litter(tmp_path)


def test_worker_killed(undisturbed, driver_process, tmp_path, chance):
    process = driver_process({chance.randrange(COUNT): "gate"}, workers=2)
    (worker,) = waiting(tmp_path)
    os.kill(worker, signal.SIGKILL)
    (tmp_path / "gate").touch()
    assert process.wait(PATIENCE) == 0
    assert folder_bytes(tmp_path / "out") == undisturbed
    assert sum(counts(tmp_path / "trace").values()) <= COUNT + 4 * SHARD_ITEMS


@pytest.mark.slow
def test_node_of_two_removed(undisturbed, driver_process, tmp_path):
    """The workers that are left take over what the lost one had, though there is room for one only."""
    process = driver_process({0: "gate", COUNT - 1: "gate"}, workers=2, module="tests.world.two_nodes")
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert len(list(tmp_path.glob("gate.*.pid"))) >= 2
    assert folder_bytes(tmp_path / "out") == undisturbed


def test_disk_full_at_a_random_write(undisturbed, run_params, tmp_path, chance):
    fates = {chance.randrange(COUNT): f"full:{chance.randrange(4)}"}
    with pytest.raises(UserError, match=r"no space left on the disk of .*run the same command again"):
        shard_workers.run(some_items(COUNT, fates), run_params(), tmp_path / "out", tmp_path / "trace")
    assert not litter(tmp_path)
    assert not (tmp_path / "out").exists()
    (tmp_path / "room").touch()
    run_again(tmp_path, run_params())
    assert folder_bytes(tmp_path / "out") == undisturbed


def test_full_file_system(undisturbed, run_params, tmp_path):
    """The same with the kernel's own refusal, where a file system may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs; test_disk_full_at_a_random_write does without")
    try:
        with pytest.raises(UserError, match="no space left on the disk of"):
            shard_workers.run(some_items(COUNT), run_params(work=disk), tmp_path / "out", tmp_path / "trace")
        assert not litter(disk)
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        summary = run_again(tmp_path, run_params(work=disk))
        assert 0 < summary.shards_done_before < summary.shards
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert folder_bytes(tmp_path / "out") == undisturbed


def test_photo_that_crashes_the_decoder(ray_started, section, run_params, tmp_path):
    photos = tmp_path / "photos"
    for number in range(4):
        (photos / "mug" / f"{number}").mkdir(parents=True)
        for view in range(3):
            noise = Image.effect_noise((96, 96), 50 + 20 * view)
            noise.convert("RGB").save(photos / "mug" / f"{number}" / f"{view}.png")
    (photos / "mug" / "2" / "1.png").write_bytes(shard_workers.SegfaultWorker.POISON)
    source = SourceParams(name="own", layout="folder", root=str(photos), split="train")
    params = section("curate", CurateParams, shard_subjects=4)

    def curate(worker: type[CurateWorker], out: Path, workers: int) -> None:
        run = run_params(workers=workers, work=out / "work")
        with driver.sole_writer("curate", run, out):
            summary = driver.run_stage(
                "curate",
                items_of(source, 24),
                partial(worker, params, [source], "cpu"),
                identity=[worker.__name__],
                kept="frames",
                others=[],
                out=out,
                run=run,
                shard_items=params.shard_subjects,
            )
            driver.report("curate", summary, out)

    for workers in (1, 2):
        curate(shard_workers.SegfaultWorker, tmp_path / f"crash{workers}", workers)
    curate(CurateWorker, tmp_path / "unread", 1)
    rejects = {out: list(tables.rows(tmp_path / out, "rejects")) for out in ("crash1", "unread")}
    assert [(row["id"], row["path"], row["reason"]) for row in rejects["crash1"]] == [
        ("own/mug/2/1", "mug/2/1.png", "crashed")
    ]
    assert [(row["id"], row["reason"]) for row in rejects["unread"]] == [("own/mug/2/1", "unreadable")]
    rows = list(tables.rows(tmp_path / "unread", "frames"))
    assert len(rows) == 11 and list(tables.rows(tmp_path / "crash1", "frames")) == rows
    assert folder_bytes(tmp_path / "crash1" / "frames") == folder_bytes(tmp_path / "crash2" / "frames")


def test_two_runs_at_once(undisturbed, driver_process, tmp_path):
    both = [driver_process({COUNT // 2: "gate"}) for _ in range(2)]
    waiting(tmp_path)
    deadline = time.monotonic() + PATIENCE
    while all(process.poll() is None for process in both):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (refused,) = (process for process in both if process.poll() is not None)
    (other,) = (process for process in both if process is not refused)
    said = refused.communicate()[1]
    assert refused.returncode == 1
    assert said == f"error: stage count is already being run by process {other.pid} on {os.uname().nodename}; " + (
        "wait for it or stop it\n"
    )
    (tmp_path / "gate").touch()
    assert other.wait(PATIENCE) == 0
    assert set(counts(tmp_path / "trace").values()) == {1}
    assert folder_bytes(tmp_path / "out") == undisturbed


class Cluster:
    """A head on loopback that wants a token, with a dashboard that takes jobs."""

    def __init__(self, folder: Path) -> None:
        gcs, dashboard, client, agent = free_ports(4)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(ROOT)}
        command = [str(RAY), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", f"--port={gcs}", f"--ray-client-server-port={client}"]
        command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}"]
        self.process = subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while self.run("job", "list", f"--address={self.address}").returncode:
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(1)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Ray's."""
        return subprocess.run([str(RAY), *words], env=self.environment, capture_output=True, text=True, cwd=ROOT)

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)  # --block ends what it started, and nothing else on the machine
        self.process.wait(PATIENCE)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: sockets lie in it
        running = Cluster(Path(folder))
        yield running
        running.end()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in sockets]


def dvc_stage(folder: Path, cluster: Cluster, command: str) -> subprocess.Popen[str]:
    """Start `dvc repro` of a stage that submits `command` as a job."""
    submit = f"{shlex.join(SUBMIT)} --address {cluster.address} --working-dir {folder / 'code'}"
    (folder / "code").mkdir()
    stage = {"cmd": f"{submit} --env PYTHONPATH -- {command}"}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": {"count": stage}}))
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "--quiet"], cwd=folder, check=True)
    return subprocess.Popen(
        [*dvc, "repro"],
        cwd=folder,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_job_without_the_token_is_refused(cluster):
    environment = cluster.environment | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [*SUBMIT, "--address", cluster.address, "--", "true"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert f"the cluster at {cluster.address} does not accept the job" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_submitted_job_writes_the_bytes_of_a_run_here(undisturbed, cluster, tmp_path):
    environment = json.dumps({"env_vars": {"PYTHONPATH": cluster.environment["PYTHONPATH"]}})
    command = [sys.executable, "-m", shard_workers.__name__, str(tmp_path), str(COUNT), "{}", "2"]
    done = cluster.run(
        "job", "submit", f"--address={cluster.address}", f"--runtime-env-json={environment}", "--", *command
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert folder_bytes(tmp_path / "out") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(("command", "code"), [("true", 0), ("false", 1)])
def test_dvc_stage_ends_as_its_job_ends(cluster, tmp_path, command, code):
    process = dvc_stage(tmp_path, cluster, command)
    said, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode == 0) == (code == 0), said
    assert ("ended with status FAILED" in said) == (code != 0)


@pytest.mark.slow
def test_dvc_stage_fails_when_its_job_is_stopped(cluster, tmp_path):
    process = dvc_stage(tmp_path, cluster, f"sh -c 'touch {tmp_path / 'begun'}; sleep 600'")
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "begun").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    jobs = cluster.run("job", "list", f"--address={cluster.address}").stdout.split("JobDetails(")
    (job,) = (re.findall(r"submission_id='(\w+)'", text)[0] for text in jobs if "RUNNING" in text)
    assert cluster.run("job", "stop", f"--address={cluster.address}", job).returncode == 0
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert f"job {job} ended with status STOPPED" in said
