"""What tests of every room share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import runtime  # noqa: F401  # sets how MKL rounds, before anything computes

REPOSITORY = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which tests run in one process: a file's, as they share fixtures; and of those that start processes, all of the
    data stages, which share a Ray, and all others, so that ranks and Ray have a core each."""
    for item in items:
        room = item.path.relative_to(REPOSITORY / "tests").parts[0]
        slow = item.get_closest_marker("slow")
        group = ("ray" if room == "pipelines" else "processes") if slow else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One CPU thread: tests run side by side, and the number of threads may change the last bits of a result."""
    import torch

    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real photographs, multiview/, openimages/ and dreambench/; without it the test is skipped."""
    folder = Path(os.environ.get("CUSTOMCONTRAST_REAL_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real photos: '{folder}' is missing; name their folder in CUSTOMCONTRAST_REAL_DATA")
    return folder
