from __future__ import annotations

import csv
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from model.adapter import Adapter
from pipelines import tables
from tests.world.ranks import REPOSITORY, die_while_saving_the_second_checkpoint, repeat_the_first_batch, run_ranks
from tests.world.training import World, write_options, write_world

OUTS = (
    "adapter/adapter.safetensors",
    "adapter/adapter.json",
    "adapter/card.json",
    "losses.csv",
    "validation.csv",
    "metrics.json",
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

HELD_OUT = {"subjects": 8, "batches": 2, "every": 5}


@dataclass(frozen=True)
class Finished:
    """A whole run of two ranks."""

    world: World
    words: list[str]
    said: str

    @property
    def out(self) -> Path:
        return self.world.data / "train"


@pytest.fixture(scope="module")
def finished(variant: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("run")
    world = write_world(folder / "data")
    words = write_options(folder, variant, world.data, validation=HELD_OUT)
    assert run_ranks(2, words, folder / "output") == [0, 0], (folder / "output").read_text()
    return Finished(world, words, (folder / "output").read_text())


def losses(out: Path, file: str = "losses.csv") -> list[dict[str, float]]:
    """Rows without their empty cells."""
    with (out / file).open() as stream:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]


def moved(world: World, folder: Path) -> Path:
    """A copy of the tables without what was trained."""
    return Path(shutil.copytree(world.data, folder / "data", ignore=shutil.ignore_patterns("train")))


def test_run_writes_adapter_losses_and_metrics(finished: Finished):
    adapter = Adapter.load(finished.out / "adapter")
    assert adapter.config.image_encoder.split("@")[0] == adapter.config.base_model
    assert adapter.data_hash is not None
    rows = losses(finished.out)
    assert [row["step"] for row in rows] == list(range(1, 13))
    header = (finished.out / "losses.csv").read_text().splitlines()[0].split(",")
    buckets = ["diffusion_0_249", "diffusion_250_499", "diffusion_500_749", "diffusion_750_999"]
    of_validation = [
        "step", "diffusion", "cscl", "macl", "location", "total", "cscl_accuracy", "macl_accuracy", *buckets
    ]  # fmt: skip
    assert header == [*of_validation, "learning_rate", "gradient_norm"]
    assert {len(row) for row in rows} != {len(header)}  # eight samples leave a bucket empty now and then
    validation = losses(finished.out, "validation.csv")
    assert [list(row) for row in validation] == [of_validation] * 3 and [row["step"] for row in validation] == [
        5,
        10,
        12,
    ]
    first, weights = rows[0], yaml.safe_load((REPOSITORY / "params.yaml").read_text())["train"]["objective"]
    contrastive = weights["contrastive_weight"] * (first["cscl"] + first["macl"])
    total = first["diffusion"] + contrastive + weights["location_weight"] * first["location"]
    assert first["total"] == pytest.approx(total, rel=1e-5)
    metrics = json.loads((finished.out / "metrics.json").read_text())
    assert (metrics["steps"], metrics["triplets"] + metrics["triplets_held_out"]) == (12, 64)
    assert 8 <= metrics["triplets_held_out"] <= 24
    assert metrics["validation"] | {"step": 12} == validation[-1]
    assert metrics["total"] == pytest.approx(rows[-1]["total"], rel=1e-5)


def test_run_says_once_what_it_does(finished: Finished):
    assert finished.said.count("train: 64 triplets") == 1
    assert "samples/s" in finished.said


def test_run_killed_while_saving_resumes_to_the_same_bytes(finished: Finished, variant: Path, tmp_path: Path):
    data = moved(finished.world, tmp_path)
    # Pictures and TensorBoard are told on the way and leave the outs as they are.
    told = {"tensorboard": True, "pictures": {"every": 6, "subjects": 2, "steps": 2}}
    words = write_options(tmp_path, variant, data, validation=HELD_OUT, **told)
    codes = run_ranks(2, words, tmp_path / "first", die_while_saving_the_second_checkpoint)
    assert codes[0] == -9
    assert not (data / "train").exists()
    assert run_ranks(2, words, tmp_path / "second") == [0, 0]
    assert "resuming at step 4 of 12" in (tmp_path / "second").read_text()
    for name in OUTS:
        assert (data / "train" / name).read_bytes() == (finished.out / name).read_bytes(), name
    (folder,) = (tmp_path / "work" / "train").glob("*/samples")
    assert [file.name for file in sorted(folder.iterdir())] == ["step-000006.png", "step-000012.png"]
    lines = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "total" in line] == list(range(1, 13))
    assert f"sample sheets in {folder}" in (tmp_path / "second").read_text()


def test_finished_run_is_not_trained_again(finished: Finished, tmp_path: Path):
    before = {name: (finished.out / name).read_bytes() for name in OUTS}
    shutil.rmtree(finished.out)  # as DVC does
    assert run_ranks(2, finished.words, tmp_path / "output") == [0, 0]
    assert "resuming at step 12 of 12" in (tmp_path / "output").read_text()
    assert {name: (finished.out / name).read_bytes() for name in OUTS} == before


def test_adapter_overfits_a_batch(finished: Finished, variant: Path, tmp_path: Path):
    data = moved(finished.world, tmp_path)
    objective = {"contrastive_weight": 0.1, "cscl_temperature": 0.5, "macl_temperature": 0.5}
    words = write_options(
        tmp_path, variant, data, steps=40, ranks=1, learning_rate=0.01, checkpoint_every=40, objective=objective
    )
    assert run_ranks(1, words, tmp_path / "output", repeat_the_first_batch) == [0]
    rows = losses(data / "train")
    assert rows[-1]["total"] < 0.9 * rows[0]["total"]
    assert rows[-1]["diffusion"] < rows[0]["diffusion"]


def test_loss_that_is_not_finite_stops_with_step_and_triplet_in_one_sentence(
    finished: Finished, variant: Path, tmp_path: Path
):
    data = moved(finished.world, tmp_path)
    poison(data / "encode", "one/train/p2/0")
    words = write_options(tmp_path, variant, data, steps=9, batch=12)
    codes = run_ranks(2, words, tmp_path / "output")
    assert codes == [1, 1]
    said = (tmp_path / "output").read_text()
    assert said.count("error:") == 1 and "Traceback" not in said
    assert "for triplets one/train/p2/0; their cached latents or features are not finite" in said
    assert "step " in said and "diffusion nan" in said
    assert not (data / "train").exists()


def test_validation_that_is_not_finite_stops_the_run_and_the_last_checkpoint_stays(
    finished: Finished, variant: Path, tmp_path: Path
):
    data = moved(finished.world, tmp_path)
    first = min(finished.world.subject_ids, key=lambda name: hashlib.blake2b(name.encode()).hexdigest())
    poison(data / "encode", f"{first}/")
    words = write_options(tmp_path, variant, data, validation=HELD_OUT, checkpoint_every=2)
    assert run_ranks(2, words, tmp_path / "output") == [1, 1]
    said = (tmp_path / "output").read_text()
    assert said.count("error:") == 1 and "Traceback" not in said
    assert "error: validation after step 4 has non-finite values (diffusion nan" in said
    assert f"for triplets {first}/" in said and "run encode again" in said
    assert not (data / "train").exists()
    assert {file.parent.name[-1] for file in (tmp_path / "work").glob("train/*/step-*/progress.json")} == {"2", "4"}


def test_noun_that_is_longer_than_a_caption_stops_the_run_before_the_first_step(
    finished: Finished, variant: Path, tmp_path: Path
):
    data = moved(finished.world, tmp_path)
    noun = " ".join(["word"] * 9)
    for folder, name in (("curate", "frames"), ("pairs", "triplets")):
        rows = tables.read(data / folder, name).to_pylist()
        for row in rows:
            if row["subject_id"] == finished.world.subject_ids[0]:
                row["class_name"] = noun
                row |= {"caption": f"a photo of a {noun}"} if name == "frames" else {}
        tables.write(data / folder, name, tables.from_rows(name, rows))
    words = write_options(tmp_path, variant, data, validation=HELD_OUT)
    assert run_ranks(1, words, tmp_path / "output") == [1]
    said = (tmp_path / "output").read_text()
    assert said.count("error:") == 1 and "Traceback" not in said
    assert "captions are too long up to their class noun (first: 'a photo of a " in said
    assert "text encoder has 32); shorten the class noun" in said
    assert not list((tmp_path / "work").glob("train/*/log.jsonl"))


def poison(folder: Path, frame_id: str) -> None:
    rows = tables.read(folder, "latents").to_pylist()
    for row in rows:
        if row["frame_id"].startswith(frame_id):
            row["latent"][0] = float("nan")
    tables.write(folder, "latents", tables.from_rows("latents", rows))
