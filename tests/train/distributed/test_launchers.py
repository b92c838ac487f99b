"""Other ways to start the ranks, and a pipeline that is killed: all end with the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.world.ranks import REPOSITORY, run_ranks
from tests.world.training import write_options, write_world
from train.launch import free_port

OUTS = ("adapter/adapter.safetensors", "adapter/adapter.json", "adapter/card.json", "losses.csv", "metrics.json")
# Long enough to be killed midway. ZeRO 0 saves each rank seconds of imports.
LONG = {"steps": 20, "zero_stage": 0}

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]


@pytest.fixture(scope="module")
def undisturbed(variant: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Tables, and what two ranks make of them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    data = write_world(folder / "data", views=10, single=2).data
    assert run_ranks(2, write_options(folder, variant, data, **LONG), folder / "output") == [0, 0]
    outs = content(data)
    shutil.rmtree(data / "train")
    return data, outs


def content(data: Path) -> dict[str, bytes]:
    return {name: (data / "train" / name).read_bytes() for name in OUTS}


@pytest.mark.parametrize("launcher", ["torchrun", "hostfile"])
def test_ranks_of_other_launchers_train_the_same(
    launcher: str, undisturbed: tuple[Path, dict[str, bytes]], variant: Path, tmp_path: Path
):
    data = Path(shutil.copytree(undisturbed[0], tmp_path / "data"))
    port = f"{free_port()}"
    if launcher == "torchrun":
        start = ["torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
        start += ["--master-port", port, "-m"]
    else:
        (tmp_path / "hosts").write_text("localhost slots=2\n")
        start = [
            "deepspeed.launcher.runner",
            "--hostfile",
            str(tmp_path / "hosts"),
            "--no_ssh_check",
            "--master_addr",
            "127.0.0.1",
        ]
        start += ["--master_port", port, "--module"]
    words = write_options(tmp_path, variant, data, **LONG)
    command = [sys.executable, "-m", *start, "train.run", *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert content(data) == undisturbed[1]


def test_pipeline_killed_at_any_step_ends_with_the_same_bytes(
    undisturbed: tuple[Path, dict[str, bytes]], variant: Path, tmp_path: Path
):
    seed = int(os.environ.get("FAULT_SEED", random.randrange(10**6)))
    print(f"FAULT_SEED={seed}")
    data = Path(shutil.copytree(undisturbed[0], tmp_path / "data"))
    project(tmp_path, write_options(tmp_path, variant, data, **LONG, checkpoint_every=2))
    first = repro(tmp_path)
    try:
        wait_for(lambda: any((tmp_path / "work" / "train").glob("*/step-*")), first)
        time.sleep(random.Random(seed).uniform(0, 0.5))
        os.killpg(first.pid, signal.SIGKILL)
    finally:
        first.kill()
        first.wait()
    assert not (data / "train" / "metrics.json").exists(), "it ended before it was killed"
    second = repro(tmp_path)
    said, _ = second.communicate(timeout=240)
    assert second.returncode == 0, said
    assert "2 ranks on cpu, ZeRO-0" in said and "samples/s" in said
    assert "resuming at step" in said
    assert content(data) == undisturbed[1]


def project(folder: Path, words: list[str]) -> None:
    """A DVC project with the train stage of this repository, on the data in `folder`."""
    stage = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]["train"]
    shutil.copy(REPOSITORY / "params.yaml", folder)
    stage["cmd"] = f"{sys.executable} -m train " + " ".join(words)
    stage["deps"] = [dep for dep in stage["deps"] if dep.startswith("data/") and (folder / dep).exists()]
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"train": stage}}))
    (folder / ".dvc").mkdir()  # as `dvc init --no-scm` does
    (folder / ".dvc" / "config").write_text("[core]\n    no_scm = True\n    analytics = false\n")


def repro(folder: Path) -> subprocess.Popen[str]:
    """`dvc repro` as the leader of a process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 240) -> None:
    """Wait until `condition()`; fails where `process` ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)
