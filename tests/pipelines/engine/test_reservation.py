"""What a worker reserves, and how many of them fit on the machines there are."""

import os
import subprocess
import sys

import pytest

from pipelines.engine import cluster
from runtime.closure import ROOT
from runtime.errors import UserError
from runtime.params import RunParams
from tests.world import shard_workers
from tests.world.shard_workers import on_cpus, some_items


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {})}


@pytest.fixture
def run():
    def make(**changes) -> RunParams:
        return on_cpus(".work", **{"workers": 2, "device": "auto", "gpus_per_worker": 1.0} | changes)

    return make


def test_gpus_are_reserved_by_share_and_on_cuda_only(run):
    assert cluster.reservation(run(gpus_per_worker=0.25, decoders=4), "cuda") == {"num_cpus": 4, "num_gpus": 0.25}
    assert cluster.reservation(run(gpus_per_worker=0.25, threads=2), "cpu") == {"num_cpus": 2, "num_gpus": 0}


@pytest.mark.parametrize(
    ("share", "machines", "fits"),
    [
        (1.0, [node(16, 1)], 1),  # the second of two workers would wait for ever
        (0.5, [node(16, 1)], 2),
        (0.1, [node(16, 1)], 10),
        (0.6, [node(16, 1), node(16, 1)], 2),  # shares of two GPUs do not add up to one worker
        (2.0, [node(16, 8), node(16, 8, alive=False)], 4),
        (0.25, [node(2, 4), node(64)], 2),  # two CPUs for sixteen workers; no GPU beside the other 64
        (1.0, [node(64)], 0),
    ],
)
def test_workers_fit_by_machine(share, machines, fits, run):
    assert cluster.room(machines, cluster.reservation(run(gpus_per_worker=share), "cuda")) == fits


def test_workers_without_gpu_fit_by_their_cpus(run):
    machines = [node(5), node(3), node(1)]
    assert cluster.room(machines, cluster.reservation(run(threads=2), "cpu")) == 3


def test_worker_that_fits_nowhere_is_one_sentence(ray_started, tmp_path):
    """A running Ray without GPUs, asked for one."""
    run = on_cpus(tmp_path / "work", device="cuda", gpus_per_worker=0.5)
    with pytest.raises(UserError, match=r"no machine has 1 CPUs and 0.5 GPUs for a worker; lower") as caught:
        shard_workers.run(some_items(2), run, tmp_path / "out", tmp_path / "trace")
    assert "\n" not in str(caught.value)


def test_ray_s_sockets_are_in_a_folder_short_enough_for_them(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for name, chosen in (("TMPDIR", "/dev/shm"), ("RAY_TMPDIR", "/dev/shm")):
        monkeypatch.setenv(name, chosen)
        assert cluster.session_folder() is None
    monkeypatch.delenv("RAY_TMPDIR")
    long = tmp_path / ("a" * 100)
    long.mkdir()
    for folder in (long, tmp_path / "none"):
        monkeypatch.setenv("TMPDIR", str(folder))
        assert cluster.session_folder() == "/tmp/ray"
    monkeypatch.setattr(cluster, "SHORT", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"too long for Ray's sockets|cannot be written, nor can .*; set TMPDIR"):
        cluster.session_folder()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("", r"Ray cannot be started \(node timed out\. See logs\); wait until .*, free some space in /dev/shm or set"),
        ("192.0.2.1:1", r"the Ray cluster at RAY_ADDRESS cannot be joined \(node timed out\. See logs\); check the"),
    ],
)
def test_ray_that_does_not_start_is_one_sentence(monkeypatch, tmp_path, address, said):
    import ray

    def fail(*args: object, **options: object) -> None:
        raise Exception("node timed out.\n  See logs.\n")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    with pytest.raises(UserError, match=said) as caught:
        cluster.connect(on_cpus(tmp_path))
    assert "\n" not in str(caught.value)


def test_ray_keeps_no_token_in_a_home_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cluster.home_can_be_written()
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    assert not cluster.home_can_be_written()
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as without HOME and an entry in /etc/passwd
    assert not cluster.home_can_be_written()


@pytest.mark.slow
def test_stage_runs_with_a_long_temporary_folder(tmp_path):
    """In a process of its own: the tests share one Ray."""
    long = tmp_path / ("a" * 100)
    long.mkdir()
    code = "from pipelines.engine import cluster; from tests.world.shard_workers import on_cpus; import ray;"
    code += "cluster.connect(on_cpus('.work')); print(ray.get(ray.remote(lambda: 7).remote()))"
    environment = os.environ | {"TMPDIR": str(long)}
    environment.pop("RAY_TMPDIR", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["7"], done.stderr
