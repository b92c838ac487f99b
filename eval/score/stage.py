"""Stage: generations and real photos -> segmentations and scores of the methods and two oracles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from eval.generate.params import GenerateParams
from eval.imported.table import import_images
from eval.protocol import protocol
from eval.protocol.plan import Plan, plan_of
from eval.protocol.prompts import PHOTO
from eval.score import STAGE, metrics, segmentation
from eval.score.groups import SubjectGroups, subject_groups
from eval.score.measures import measure
from eval.score.scorer import ScoreParams, comparable, load_finder, load_scorer, specs
from eval.score.segmentation import PLACE, Row
from eval.score.views import ScoredImage, ScoringWork
from eval.tasks.resume import Tally, Task, run_tasks
from model.backbones.identity import weights_name
from model.backbones.variant import Spec, Variant, load_variant
from pipelines import tables
from pipelines.photos.roots import Roots, SourceParams
from runtime.closure import code_digest
from runtime.errors import UserError
from runtime.files import write_csv, write_json, write_metrics
from runtime.params import Params, RunParams
from runtime.text import text_table

ASKED = ("subject_id", "group", "prompt_id", "prompt", "reference")


def generated(folder: Path) -> Iterator[list[Row]]:
    """Yield the rows of the generations table in `folder`, grouped by method and subject."""
    for _, group in groupby(tables.rows(folder, "generations"), key=_maker):
        yield list(group)


def asked_in(generations: Iterable[Row]) -> dict[str, list[ScoredImage]]:
    """Return, by subject_id, each prompt and reference that an image was generated from, as `planned` does."""
    found: dict[str, dict[ScoredImage, None]] = {}
    for row in generations:
        if row["group"] != protocol.PAIR:  # one photo cannot stand for an image of two subjects
            picture = ScoredImage(row["group"], row["prompt_id"], 0, row["prompt"], shown_to(row))
            found.setdefault(row["subject_id"], {})[picture] = None
    return {subject: list(pictures) for subject, pictures in found.items()}


def told_of(asked: dict[str, list[ScoredImage]]) -> Iterator[protocol.Asked]:
    """Yield each prompt and reference of `asked_in` or `planned` with its subject."""
    for subject_id, questions in asked.items():
        for question in questions:
            assert question.prompt is not None  # only photos have none
            for reference in question.shown or ("",):
                yield subject_id, question.group, question.prompt_id, question.prompt, reference


def planned(plan: Plan) -> dict[str, list[ScoredImage]]:
    """Return, by subject_id, each prompt and reference of the protocol, without generations."""
    found = {}
    for subject, jobs in plan.singles:
        asked = [ScoredImage(job.group, job.prompt_id, 0, job.prompt, (job.reference.frame_id,)) for job in jobs]
        found[subject.subject_id] = list(dict.fromkeys(asked))
    return found


def with_references(questions: Iterable[ScoredImage], photos: Sequence[protocol.HeldOutPhoto]) -> list[ScoredImage]:
    """Return a subject's prompts and references without unknown ones: each photo in turn stands for the reference of a
    prompt of which no image has a known one."""
    known = [question for question in questions if question.shown]
    told = {(question.group, question.prompt_id) for question in known}
    unknown = [q for q in questions if not q.shown and (q.group, q.prompt_id) not in told]
    return known + [replace(question, shown=(photo.frame_id,)) for question in unknown for photo in photos]


def works(
    subjects: Iterable[protocol.HeldOutSubject],
    asked: dict[str, list[ScoredImage]],
    made: Iterable[Sequence[Row]],
    segmentations: Iterable[Row],
    leave_out: bool,
    params: ScoreParams,
) -> Iterator[ScoringWork]:
    """Yield the oracles of each subject in `asked`, then each method's images of each subject.

    Subjects without a photo to compare with are skipped.

    Args:
        asked: the prompts and references, by subject_id.
        made: rows of the generations table, grouped by method and subject.
        segmentations: rows of that table, for the same images.
        leave_out: whether an image is compared only with the photos that are not its references.

    Raises:
        UserError: an image was generated from a photo that is no longer among those compared with.
    """
    by_id = {subject.subject_id: (subject, comparable(subject, params)) for subject in subjects}
    for subject_id, questions in asked.items():
        subject, photos = by_id.get(subject_id, (None, ()))
        questions = with_references(questions, photos)
        missing = {frame_id for question in questions for frame_id in question.shown} - {p.frame_id for p in photos}
        if missing:
            raise UserError(
                f"generations were made from '{min(missing)}', which no longer has a usable mask; run generate again, "
                "or score --images for images made elsewhere"
            )
        if subject is not None and photos:
            yield ScoringWork(metrics.REAL, subject, photos, real_photos(questions, photos), leave_out, real=True)
            yield ScoringWork(metrics.COPY, subject, photos, copies(questions, photos), leave_out)
    masks = {place(row): row for row in segmentations}
    for rows in made:
        subject, photos = by_id.get(rows[0]["subject_id"], (None, ()))
        if subject is not None and photos:
            pictures = tuple(
                ScoredImage(r["group"], r["prompt_id"], r["index"], r["prompt"], shown_to(r), r, masks[place(r)])
                for r in rows
            )
            yield ScoringWork(rows[0]["method"], subject, photos, pictures, leave_out)


def real_photos(questions: Sequence[ScoredImage], photos: Sequence[protocol.HeldOutPhoto]) -> tuple[ScoredImage, ...]:
    """Return the oracle of real photos: each stands for an image generated from the references."""
    references = dict.fromkeys(frame_id for question in questions for frame_id in question.shown)
    return tuple(
        ScoredImage(PHOTO, -1, number, None, tuple(r for r in references if r != photo.frame_id), photo=number)
        for number, photo in enumerate(photos)
    )


def copies(questions: Sequence[ScoredImage], photos: Sequence[protocol.HeldOutPhoto]) -> tuple[ScoredImage, ...]:
    """Return the copy-paste oracle: the reference photo itself stands for each image asked for."""
    numbers = {photo.frame_id: number for number, photo in enumerate(photos)}
    seen: dict[tuple[str, int], int] = {}
    answers = []
    for question in questions:
        if question.shown:
            key = (question.group, question.prompt_id)
            seen[key] = seen.get(key, -1) + 1
            photo = numbers[question.shown[0]]
            answers.append(
                ScoredImage(question.group, question.prompt_id, seen[key], question.prompt, question.shown, photo=photo)
            )
    return tuple(answers)


def tasks(found: Iterable[ScoringWork], params: ScoreParams, weights: dict[str, str]) -> Iterator[Task]:
    """Yield a task for each metric of each work, grouped by work; `weights`: the id of each model's weights."""
    kinds = params.kinds()
    for work in found:
        photos = [photo.fingerprint for photo in work.photos]
        images = segmentation.digests(picture.made for picture in work.pictures if picture.made is not None)
        asked = [[p.group, p.prompt_id, p.index, p.prompt, p.shown, p.photo] for p in work.pictures]
        masks = [p.segmentation and (p.segmentation["rle"] or b"").hex() for p in work.pictures]
        for name in params.metrics:
            chosen = measure(name, kinds)
            inputs = [name, [weights[model] for model in chosen.models], photos, asked, images, work.leave_out]
            inputs += [masks, params.miss] if chosen.segments else []
            yield Task(f"{work.method}/{work.subject.subject_id}", inputs, len(work.pictures), (work, name))


def shown_to(row: Row) -> tuple[str, ...]:
    """Return the references of an image."""
    return (row["reference"],) if row["reference"] else ()


def place(row: Row) -> tuple[Any, ...]:
    """Return the key of an image."""
    return tuple(row[key] for key in PLACE)


def _maker(row: Row) -> tuple[str, str]:
    return row["method"], row["subject_id"]


def segment(params: ScoreParams, variant: Variant, folder: Path, out: Path, run: RunParams) -> dict[str, str]:
    """Write the segmentations table of the images in `folder`; return the ids of the weights."""
    weights = names({"detector": variant.detector, "sam": variant.sam})
    how = params.model_dump(include={"phrase", "min_detection", "min_piece", "batch_size", "dtype", "threads"})
    run_tasks(
        "score",
        "segmentations",
        segmentation.tasks((rows, segmentation.digests(rows)) for rows in generated(folder)),
        tables.count(folder, "generations"),
        identity=["segmentations", how, code_digest("eval.score.segmentation"), weights],
        start=partial(load_finder, params, variant, run.torch_device(), run.decoders),
        out=out,
        run=run,
    )
    return weights


def names(found: dict[str, Spec]) -> dict[str, str]:
    """Return the id of each model's weights.

    Raises:
        UserError: a file is missing; checked up front rather than hours into the run.
    """
    for spec in found.values():
        if not spec.local.exists() and spec.revision is None:
            raise UserError(
                f"{spec.path}: no such file or folder; put the weights there, or correct the variant's JSON"
            )
    return {role: weights_name(spec) for role, spec in found.items()}


def main(
    params: Params,
    photos_only: bool = False,
    images: Sequence[str] | None = None,
    method_name: Sequence[str] | None = None,
    token: str | None = None,
) -> None:
    """Run the stage.

    Args:
        photos_only: score only the oracles, which needs neither an adapter nor generations.
        images: folders, archives or CSV files of images made elsewhere, to be scored with those generated here.
        method_name: the methods that made them, one for each.
        token: see `eval.imported.names.Names`.

    Raises:
        UserError: an option is given without those it belongs to, or `eval.imported.table.import_images` does.
    """
    if images and photos_only:
        raise UserError("--photos-only scores no images; leave it out, or --images")
    if (method_name or token) and not images:
        raise UserError("--method-name and --token belong to --images; add it, or leave them out")
    score, run = params.section("score", ScoreParams), params.run
    variant, sources = load_variant(params.variant), params.section("sources", list[SourceParams])
    rules = params.section("generate", GenerateParams).protocol
    data, out = params.data, params.data / STAGE.name
    made, subjects, weights = data / "generate", protocol.held_out(data), names(specs(score, variant))
    kinds = subject_groups(Roots(sources), subjects)
    if images:
        import_images(data, images, method_name or (), token or "", rules, score.photo_quality, run)
    recorded: dict[str, Any]
    rows: Iterator[list[Row]]
    if photos_only:
        plan = plan_of(data, rules)
        recorded = {"id": plan.id(rules.reference, variant.resolution), "protocol": rules.model_dump()}
        asked, rows, count = planned(plan), iter(()), 0
        tables.write(out, "segmentations", tables.from_rows("segmentations", []))
    else:
        recorded = protocol.read_protocol(made / "protocol.json")
        asked = asked_in(tables.rows(made, "generations", ASKED))
        rows, count = generated(made), tables.count(made, "generations")
        weights |= segment(score, variant, made, out, run)
    leave_out = recorded["protocol"]["reference"] == protocol.LEAVE_ONE_OUT
    found = works(subjects, asked, rows, tables.rows(out, "segmentations"), leave_out, score)
    for subject in subjects:
        photos = comparable(subject, score)
        count += len(photos) + len(with_references(asked.get(subject.subject_id, ()), photos))
    tally = run_tasks(
        "score",
        "scores",
        tasks(found, score, weights),
        count * len(score.metrics),
        identity=[score.model_dump(include={"margin", "batch_size", "dtype", "threads"}), STAGE.code()],
        start=partial(load_scorer, score, variant, Roots(sources), run.torch_device(), run.decoders),
        out=out,
        run=run,
    )
    settings = score.model_dump(mode="json", exclude={"threads", "batch_size", "encoders"})
    prompts = protocol.prompts_id(subjects, told_of(asked), leave_out)
    of = {"id": recorded["id"], "prompts_id": prompts, "variant": variant.name, "encoders": weights}
    write_json(out / "protocol.json", of | settings | {"subject_groups": kinds})
    report(out, subjects, kinds, score, tally)


def report(
    out: Path,
    subjects: Sequence[protocol.HeldOutSubject],
    kinds: SubjectGroups,
    params: ScoreParams,
    tally: Tally,
) -> None:
    """Write metrics.json, groups.csv (for `dvc plots`) and subject_groups.csv from the tables, and print the scores."""
    rows, segmentations = tables.read(out, "scores").to_pylist(), tables.read(out, "segmentations").to_pylist()
    scores = metrics.summaries(rows, segmentations, params.intervals)
    places = metrics.positions(scores)
    photos = sum(len(subject.photos) for subject in subjects)
    compared = sum(len(comparable(subject, params)) for subject in subjects)
    wanted = ", ".join(params.photo_quality)
    skipped = [subject.subject_id for subject in subjects if not comparable(subject, params)]
    counts = {"photos": photos, "photos_compared": compared, "subjects_without_photos": len(skipped)}
    # Without groups and subjects, which would add hundreds of metrics.
    overall = {
        method: {
            **metrics.columns(values),
            **{key: values[key] for key in ("pictures", "misses", "miss_rate")},
            **({"position": {name: places[method][name] for name in metrics.METRICS}} if method in places else {}),
        }
        for method, values in scores.items()
    }
    write_metrics(out, {**overall, **counts}, headline(overall))
    write_csv(out / "groups.csv", ("method", "group", "metric", "value", "low", "high"), group_rows(scores))
    by_kind = metrics.by_subject_group(rows, segmentations, kinds, params.intervals)
    header = ("column", "group", "method", "subjects", "metric", "value", "low", "high", "miss_rate")
    write_csv(out / "subject_groups.csv", header, subject_group_rows(by_kind))
    print(
        f"score: {', '.join(params.metrics)} of {len({place(row) for row in rows})} images, "
        f"{tally.done_before} of {tally.subjects} tasks already done; {tally.seconds:.1f} s"
    )
    print(f"  real photos: {compared} of {photos} used for comparison; the others have no mask of quality {wanted}")
    if skipped:
        print(f"  subjects skipped, no photo with such a mask: {', '.join(skipped)}")
    print(text_table(("", *scores), table(scores)))
    if places:
        print(
            f"  position: 0 is {metrics.PROMPT_ONLY}, 1 is {metrics.TRUTH}; -: {metrics.TRUTH} is not clearly above it"
        )
        print(text_table(("", *places), [[name, *(of[name] for of in places.values())] for name in metrics.METRICS]))
    meaning = {"zero": "count as 0", "skip": "are excluded", "unsegmented": "are of the whole image"}[params.miss]
    for column, of in kinds.items():
        told = ", ".join(f"{len(ids)} {value}" for value, ids in of.items())
        print(f"  subjects by {column}: {told} of {len(subjects)}; {out / 'subject_groups.csv'} has their scores")
    for method, values in scores.items():
        if values["misses"]:
            print(
                f"  {method}: class noun not found in {values['misses']} of {values['pictures']} images; "
                f"their similarities {meaning}"
            )


def headline(overall: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Return the paper's columns for the model, or for the first method if it was not scored: a one-line summary."""
    chosen = overall.get(metrics.MODEL) or next(iter(overall.values()), {})
    means = {name: chosen[name]["mean"] for name in metrics.METRICS if chosen.get(name)}
    return {**means, "not_found": chosen.get("misses")}


def table(scores: dict[str, dict[str, Any]]) -> Iterator[list[Any]]:
    """Yield the rows of a table with one column per method, mean and interval."""
    found = {method: metrics.columns(values) for method, values in scores.items()}
    for column in dict.fromkeys(column for columns in found.values() for column in columns):
        yield [column, *(_with_interval(columns.get(column)) for columns in found.values())]
    yield ["images", *(values["pictures"] for values in scores.values())]
    yield ["not found", *(values["misses"] for values in scores.values())]


def group_rows(scores: dict[str, dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """Yield (method, group, metric, value, low, high) of every score of a prompt group."""
    for method, values in scores.items():
        for group, by_metric in values["groups"].items():
            for metric, value in by_metric.items():
                if value is not None:
                    yield method, group, metric, value["mean"], value["low"], value["high"]


def subject_group_rows(by_kind: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> Iterator[tuple[Any, ...]]:
    """Yield (column, group, method, subjects, metric, value, low, high, miss rate) of `metrics.by_subject_group`."""
    for column, groups in by_kind.items():
        for group, by_method in groups.items():
            for method, values in by_method.items():
                for metric, value in metrics.columns(values).items():
                    if value is not None:
                        place = (column, group, method, len(values["subjects"]), metric)
                        yield *place, value["mean"], value["low"], value["high"], values["miss_rate"]


def _with_interval(value: metrics.Estimate | None) -> str | None:
    if value is None or value["low"] is None or value["high"] is None:
        return None if value is None else f"{value['mean']:.4f}"
    return f"{value['mean']:.4f} [{value['low']:.3f}, {value['high']:.3f}]"
