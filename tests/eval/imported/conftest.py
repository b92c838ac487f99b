"""Images as another program might have left them: a folder and a CSV file of the small world's subjects."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from eval.imported.names import Names, names_in
from eval.protocol import protocol
from eval.protocol.plan import plan_of
from eval.protocol.protocol import ProtocolParams
from eval.score import stage as score
from eval.score.scorer import Scorer
from eval.score.segmentation import SubjectFinder
from pipelines import tables
from pipelines.photos.roots import Roots
from runtime.files import write_json
from runtime.params import PARAMS_FILE, Params, RunParams, read_yaml
from tests.conftest import REPOSITORY

METHOD = "customcontrast"
METRICS = ["clip_t", "reward", "clip_i", "dino_i", "clip_i_whole", "copy_paste", "diversity"]


@pytest.fixture
def names(data: Path, protocol_params: ProtocolParams) -> Names:
    subjects = protocol.held_out(data)
    usable = {photo.frame_id for subject in subjects for photo in subject.photos if photo.quality in ("ok", "border")}
    return names_in(subjects, protocol.prompts_by_subject(data), protocol_params, usable)


@pytest.fixture
def folder(tmp_path: Path, fakes: SimpleNamespace) -> Path:
    """Two images of each of the duck's and the mug's prompts."""
    place = tmp_path / "mine"
    for subject, colour in (("duck", (230, 180, 20)), ("mug", (30, 60, 200))):
        for number, prompt in enumerate(
            (f"a_{subject}_on_a_beach", f"a_{subject}_in_snow", f"a_sketch_of_a_{subject}")
        ):
            for seed in (0, 1):
                ground = (40 * number + 9, 120, 90 + 50 * seed)
                put(place / subject / f"{prompt}_{seed}.png", fakes.draw(colour, seed, ground)[0])
    return place


def put(file: Path, image: Image.Image) -> Path:
    """Write an image, and the folders that it is in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    return file


def table(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as a CSV file."""
    members = list(rows)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(members[0]))
        writer.writeheader()
        writer.writerows(members)
    return file


@pytest.fixture
def generated(data: Path, protocol_params: ProtocolParams, fakes: SimpleNamespace) -> Path:
    """The data folder with what generate writes: two images of each prompt by one method."""
    params = protocol_params.model_copy(update={"images": 2})
    plan, rows = plan_of(data, params), []
    for subject, jobs in plan.singles:
        for job in jobs:
            image = fakes.Painter()([], [subject.class_name], [job.prompt], [job.seed])[0]
            row = {
                "method": METHOD,
                "subject_id": subject.subject_id,
                "class_name": subject.class_name,
                "partner": None,
            }
            row |= {name: getattr(job, name) for name in ("prompt_id", "group", "prompt", "index", "seed")}
            rows.append(row | {"reference": job.reference.frame_id, "image": fakes.png(image)})
    tables.write(data / "generate", "generations", tables.from_rows("generations", rows))
    recorded = {"id": plan.id(params.reference, fakes.side), "protocol": params.model_dump(), "methods": {METHOD: {}}}
    write_json(data / "generate" / "protocol.json", recorded)
    return data


@pytest.fixture
def score_stage(
    data: Path,
    roots: Roots,
    run: RunParams,
    fakes: SimpleNamespace,
    protocol_params: ProtocolParams,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., dict[str, Any]]:
    """The score stage's command on the small world, with models that answer by the mean colour.

    Returns {(method, subject_id, group, prompt_id, seed, metric): value}, with the index for a seed of oracles.
    """

    def finder(*_: Any) -> SubjectFinder:
        return SubjectFinder(fakes.Segmenter(), "{class}", 0.25, 0.1, 1, 2)

    def scorer(params: Any, variant: Any, roots: Any, device: str, decoders: int) -> Scorer:
        return Scorer(params, fakes.Models(), roots, decoders)

    dropped = tables.reject("bench/duck/99", "curate", "blurred")
    tables.write(data / "curate", "rejects", tables.from_rows("rejects", [dropped]))
    monkeypatch.setattr(score, "load_finder", finder)
    monkeypatch.setattr(score, "load_scorer", scorer)
    monkeypatch.setattr(score, "names", lambda found: dict.fromkeys(found, "weights"))
    tree = read_yaml(REPOSITORY / PARAMS_FILE)
    tree["run"] = run.model_dump()
    tree["score"] |= {"metrics": METRICS, "photo_quality": ["ok", "border"]}
    tree["sources"] = [{"name": "photos", "layout": "folder", "root": roots["photos"].place, "split": "test"}]

    def stage(*images: Path, rules: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        tree["generate"]["protocol"] = protocol_params.model_dump() | (rules or {})
        score.main(Params(tree, data), images=[str(place) for place in images] or None, **options)
        key = ("method", "subject_id", "group", "prompt_id", "index")
        seeds = {tuple(row[k] for k in key): row["seed"] for row in tables.rows(data / "generate", "generations")}
        found = {}
        for row in tables.rows(data / "score", "scores"):
            place = tuple(row[name] for name in key)
            found[(*place[:-1], seeds.get(place, row["index"]), row["metric"])] = row["value"]
        return found

    return stage
