"""Stage: generations and real photos -> scores, with two oracles beside the model.

`python -m eval.score`; with `--photos-only` it scores the oracles alone, which needs neither an adapter nor generations
(for other photos: run curate and mask with `--data DIR`, then this with the same options).
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from eval import metrics, outputs, protocol
from eval.generate import GenerateParams
from eval.resume import Tally, Task, run_tasks
from eval.scorer import Asked, ScoreParams, Work, comparable, load_scorer
from model.backbones.variant import Variant, load_variant
from params import BackbonesParams, RunParams, UserError, cli, data_dir, load, option_parser
from pipelines import tables
from pipelines.storage import SourceParams
from stage import digest_files, write_json

HERE = Path(__file__).parent
CODE = (
    *(HERE / name for name in ("scorer.py", "metrics.py", "protocol.py", "segmentation.py")),
    HERE.parent / "model" / "backbones",
    HERE.parent / "model" / "segment.py",
)

Questions = tuple[str, list[Asked], list[dict[str, Any]]]
"""subject_id, what was asked, rows of the generations table."""


def generated(folder: Path) -> Iterator[Questions]:
    """Yield what the generations table in `folder` holds of each subject, by all methods."""
    ordered = sorted(tables.rows(folder, "generations"), key=lambda row: tables.path_order(row["subject_id"]))
    for subject_id, group in groupby(ordered, key=lambda row: row["subject_id"]):
        rows = list(group)
        asked = [Asked(r["prompt_id"], r["group"], r["prompt"], r["reference"]) for r in rows]
        yield subject_id, list(dict.fromkeys(asked)), rows


def planned(
    subjects: Iterable[protocol.Subject],
    prompts: dict[str, list[dict[str, Any]]],
    params: protocol.ProtocolParams,
) -> Iterator[Questions]:
    """Yield what the protocol would ask of each subject, with nothing generated."""
    for subject in subjects:
        jobs = protocol.jobs(subject, prompts.get(subject.subject_id, []), params)
        asked = [Asked(job.prompt_id, job.group, job.prompt, job.reference.frame_id) for job in jobs]
        yield subject.subject_id, list(dict.fromkeys(asked)), []


def tasks(subjects: Iterable[protocol.Subject], questions: Iterable[Questions], params: ScoreParams) -> Iterator[Task]:
    """Yield the task of each subject that has photos to compare with.

    Raises:
        UserError: a picture was made from a photo that is no longer among those compared with.
    """
    by_id = {subject.subject_id: subject for subject in subjects}
    for subject_id, asked, generations in questions:
        photos = comparable(by_id[subject_id], params) if subject_id in by_id else ()
        gone = {a.reference for a in asked} - {photo.frame_id for photo in photos}
        if gone:
            raise UserError(
                f"generations were made from '{min(gone)}', which has no usable mask now; run generate again"
            )
        if photos:
            images = [hashlib.sha256(row["image"]).hexdigest() for row in generations]
            inputs = [[photo.fingerprint for photo in photos], [vars(a) for a in asked], images]
            work = Work(by_id[subject_id], photos, tuple(asked), tuple(generations))
            yield Task(subject_id, inputs, len(generations) or len(photos), work)


def encoders(variant: Variant, photos_only: bool) -> dict[str, str]:
    """Return what names the weights the scores depend on."""
    specs = {"clip": variant.clip, "dino": variant.dino}
    if not photos_only:
        specs |= {"detector": variant.detector, "sam": variant.sam}
    return {role: outputs.weights_name(spec) for role, spec in specs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(parents=[option_parser()], allow_abbrev=False, description=__doc__)
    parser.add_argument("--photos-only", action="store_true", help="score the oracles on real photos, no generations")
    photos_only = parser.parse_args().photos_only
    params, run = load("score", ScoreParams), load("run", RunParams)
    variant, sources = load_variant(load("backbones", BackbonesParams).variant), load("sources", list[SourceParams])
    data, out = data_dir(), data_dir() / "score"
    subjects = protocol.held_out(data)
    if photos_only:
        plan = load("generate", GenerateParams).protocol
        questions = planned(subjects, protocol.prompts_by_subject(data), plan)
        total = sum(len(comparable(subject, params)) for subject in subjects)
    else:
        questions = generated(data / "generate")
        total = tables.read(data / "generate", "generations", ["index"]).num_rows
    used = encoders(variant, photos_only)
    tally = run_tasks(
        "score",
        "scores",
        tasks(subjects, questions, params),
        total,
        identity=[params.model_dump(), photos_only, digest_files(*CODE), used],
        start=partial(load_scorer, params, variant, sources, run.torch_device(), photos_only),
        out=out,
        run=run,
    )
    settings = {"variant": variant.name, "encoders": used, **params.model_dump(exclude={"threads", "batch_size"})}
    write_json(out / "protocol.json", settings)
    report(out, subjects, params, tally)


def report(out: Path, subjects: Sequence[protocol.Subject], params: ScoreParams, tally: Tally) -> None:
    """Write metrics.json and groups.csv (for `dvc plots`) from the scores table, and print them."""
    scores = metrics.summaries(tables.read(out, "scores").to_pylist())
    photos = sum(len(subject.photos) for subject in subjects)
    compared = sum(len(comparable(subject, params)) for subject in subjects)
    wanted = ", ".join(params.photo_quality)
    bare = [subject.subject_id for subject in subjects if not comparable(subject, params)]
    counts = {"photos": photos, "photos_compared": compared, "subjects_without_photos": len(bare)}
    # Groups go to the plot alone: as metrics they would be fifty columns.
    overall = {method: {k: v for k, v in values.items() if k != "groups"} for method, values in scores.items()}
    write_json(out / "metrics.json", {**overall, **counts})
    header = ("method", "group", "metric", "value")
    outputs.write_csv(out / "groups.csv", header, group_rows(scores))
    print(
        f"score: {tally.pictures} pictures of {tally.subjects} subjects, {tally.done_before} subjects done before; "
        f"{tally.seconds:.1f} s"
    )
    print(f"  real photos: {compared} of {photos} compared with; the others have no mask of quality {wanted}")
    if bare:
        print(f"  left out, no photo with such a mask: {', '.join(bare)}")
    names = ("pictures", "misses", *metrics.METRICS)
    print(outputs.text_table(("method", *names), [[m, *(s[name] for name in names)] for m, s in scores.items()]))
    if metrics.MODEL in scores:
        missed, made = scores[metrics.MODEL]["misses"], scores[metrics.MODEL]["pictures"]
        meaning = {"zero": "count 0", "skip": "are left out", "unsegmented": "are compared whole"}[params.miss]
        print(f"  in {missed} of {made} pictures the class noun was not found; their similarities {meaning}")


def group_rows(scores: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str, float]]:
    """Yield (method, group, metric, value) of every score of a group of prompts."""
    for method, values in scores.items():
        for group, by_metric in values["groups"].items():
            for metric, value in by_metric.items():
                if value is not None:
                    yield method, group, metric, value


if __name__ == "__main__":
    cli(main)
