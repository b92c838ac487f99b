"""A world of three small held-out subjects and some training photos, with tables as the data stages write them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from eval.protocol.protocol import ProtocolParams
from pipelines import tables
from pipelines.photos.roots import Roots, SourceParams
from runtime.params import RunParams
from tests.world.evaluation import (
    COLOURS,
    HOSTILE,
    PROMPTS,
    SIDE,
    TEST_SUBJECTS,
    FakeModels,
    FakePainter,
    FakeSegmenter,
    draw,
    frame,
    mask_row,
)
from tests.world.photos import encoded
from tests.world.report import full, page, sources  # noqa: F401  # fixtures of the report


@pytest.fixture
def run(tmp_path: Path) -> RunParams:
    return RunParams(
        workers=1,
        threads=1,
        decoders=1,
        device="cpu",
        gpus_per_worker=0,
        restarts=0,
        work=str(tmp_path / "work"),
        purpose="research",
    )


@pytest.fixture
def protocol_params() -> ProtocolParams:
    return ProtocolParams(
        reference="first",
        references={},
        prompt_set="source",
        prompts=None,
        images=1,
        reconstructions=2,
        reconstruction="a photo of a {class}",
        pairs=0,
        seed=0,
    )


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    (tmp_path / "photos").mkdir(exist_ok=True)
    source = SourceParams(name="photos", layout="folder", root=str(tmp_path / "photos"), split="test")
    return Roots([source])


@pytest.fixture
def data(tmp_path: Path, roots: Roots) -> Path:
    """The folder of curate's and mask's tables: duck and mug with four photos, ring without a usable mask."""
    folder, frames, masks, prompts = tmp_path / "data", [], [], []
    for subject, class_name in TEST_SUBJECTS.items():
        for number in range(4):
            frame_id = f"{subject}/{number:02d}"
            red, green, blue = COLOURS[class_name]  # in another light each time
            image, mask = draw((red, green, blue + 40 * number), number, (90 + 20 * number, 120, 90))
            file = tmp_path / "photos" / f"{frame_id}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(image))
            frames.append(frame(frame_id, class_name, "test"))
            first_is_bad = number == 0 and class_name == "mug"
            if class_name != "ring":
                method = "grounded_sam" if number % 2 else "annotated"
                masks.append(mask_row(frame_id, mask, "border" if first_is_bad else "ok", method))
        for number, (group, template) in enumerate(PROMPTS):
            row = {"subject_id": subject, "class_name": class_name, "prompt_id": number}
            prompts.append(row | {"template": template, "group": group})
    tables.write(folder / "curate", "frames", tables.from_rows("frames", frames))
    tables.write(folder / "curate", "prompts", tables.from_rows("prompts", prompts))
    tables.write(folder / "mask", "masks", tables.from_rows("masks", masks))
    return folder


@pytest.fixture
def fakes() -> SimpleNamespace:
    return SimpleNamespace(
        Models=FakeModels,
        Segmenter=FakeSegmenter,
        Painter=FakePainter,
        draw=draw,
        png=encoded,
        frame=frame,
        mask_row=mask_row,
        hostile=HOSTILE,
        side=SIDE,
    )
