"""What the tests of the data stages share: the repository's own params, and one Ray for all that need it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from runtime.closure import ROOT
from runtime.params import RunParams, Section, parse
from tests.world.shard_workers import on_cpus

T = TypeVar("T", bound=Section)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses Ray as slow."""
    for item in items:
        if "ray_started" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def section() -> Callable[..., Any]:
    """`section("mask", MaskParams, batch_size=2)`: a section of params.yaml with some values changed."""
    tree = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))

    def read(name: str, model: type[T], **changes: Any) -> T:
        return parse(name, {**tree[name], **changes}, model)

    return read


@pytest.fixture(scope="session")
def ray_started() -> Iterator[None]:
    """Ray with four CPUs, left running between stages: starting it takes longer than most tests that use it."""
    from pipelines.engine import cluster

    with pytest.MonkeyPatch.context() as patch:  # so that Ray's workers can import from tests
        patch.setenv("PYTHONPATH", str(ROOT))
        assert cluster.connect(on_cpus(".work", workers=4))
    yield
    import ray

    ray.shutdown()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes of archives go to a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def run_params(tmp_path: Path) -> Callable[..., RunParams]:
    """`run_params(workers=2)`: how a stage is run, with a work folder of the test's own."""

    def make(workers: int = 1, work: Path = tmp_path / "work", **changes: Any) -> RunParams:
        return on_cpus(work, workers, **changes)

    return make
