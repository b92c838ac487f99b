"""What tests of every package share."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real photographs, multiview/, openimages/ and dreambench/; without it the test is skipped."""
    folder = Path(os.environ.get("CUSTOMCONTRAST_REAL_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real photos: '{folder}' is missing; name their folder in CUSTOMCONTRAST_REAL_DATA")
    return folder
