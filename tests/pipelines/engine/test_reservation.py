"""What a worker reserves, and how many of them fit on the machines there are."""

import pytest

from pipelines.engine import cluster
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
