"""What the tests of the data stages share: the repository's own params, and one Ray for all that need it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from runtime import params

REPOSITORY = Path(__file__).parents[2]

T = TypeVar("T", bound=params.Section)


@pytest.fixture(scope="session")
def section() -> Callable[..., Any]:
    """`section("mask", MaskParams, batch_size=2)`: a section of params.yaml with some values changed."""
    tree = yaml.safe_load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))

    def read(name: str, model: type[T], **changes: Any) -> T:
        return params.parse(name, {**tree[name], **changes}, model)

    return read


@pytest.fixture(scope="session")
def ray_started() -> Iterator[None]:
    """Ray with four CPUs, left running between stages: starting it takes longer than most tests that use it."""
    from pipelines.engine import cluster

    run = params.RunParams(
        workers=4, threads=1, decoders=1, device="cpu", gpus_per_worker=0.0, restarts=3, work=".work"
    )
    with pytest.MonkeyPatch.context() as patch:  # Ray's workers find this folder's modules as pytest does
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)]))
        assert cluster.connect(run)
    yield
    import ray

    ray.shutdown()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes of archives go to a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def run_params(tmp_path: Path) -> Callable[..., params.RunParams]:
    """`run_params(workers=2)`: how a stage is run, with a work folder of the test's own."""

    def make(workers: int = 1, restarts: int = 3, work: Path = tmp_path / "work") -> params.RunParams:
        return params.RunParams(
            workers=workers, threads=1, decoders=1, device="cpu", gpus_per_worker=0.0, restarts=restarts, work=str(work)
        )

    return make
