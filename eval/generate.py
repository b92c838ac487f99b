"""Stage: held-out subjects and prompts -> pictures, by each method that is evaluated.

`python -m eval.generate`; `--adapter DIR` draws with another adapter than `<data>/train/adapter`.
"""

from __future__ import annotations

import argparse
import gc
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field, field_validator

from eval import outputs, protocol
from eval.methods import MethodInputs, Painter, find_method
from eval.resume import Tally, Task, run_tasks
from model.backbones.variant import load_variant
from params import BackbonesParams, RunParams, Section, UserError, cli, data_dir, load, option_parser
from pipelines.storage import Roots, SourceParams
from stage import digest_files, write_json

HERE = Path(__file__).parent
CODE = (HERE / "generate.py", HERE / "methods.py", HERE / "protocol.py", HERE.parent / "model")
# The same pictures whatever these say; which pictures a task has is among its inputs.
NOT_OF_A_PICTURE = {"methods", "protocol", "processes"}


class GenerateParams(Section):
    """Which pictures are made, and how."""

    methods: tuple[str, ...] = Field(min_length=1)  # names of eval/methods.py, or package.module:function of others
    protocol: protocol.ProtocolParams
    steps: int = Field(ge=1)  # of the sampler
    guidance_scale: float
    strength: float  # lambda, of the visual branch
    location_masks: bool  # confine the subject to where its attention lay a step before
    margin: float  # white border of the reference's segment, fraction of its longer side
    batch_size: int = Field(ge=1)  # pictures at once
    dtype: Literal["float32", "float16", "bfloat16"]
    threads: int  # CPU threads of a process; the same number gives the same bytes
    processes: int = Field(ge=1)  # which subjects are dealt out to; on GPUs at most one each. The same bytes for any

    @field_validator("methods")
    @classmethod
    def once(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(methods)) < len(methods):
            raise ValueError("a method is listed twice")
        return methods


Picture = tuple[protocol.Job, ...]
"""A picture to make, as it concerns each of the subjects in it."""


@dataclass(frozen=True)
class Work:
    """The pictures that one method makes of a subject, or of a pair together."""

    method: str
    subjects: tuple[protocol.Subject, ...]
    pictures: Sequence[Picture]

    @property
    def name(self) -> str:
        """What names it among the work of a method."""
        return "+".join(subject.subject_id for subject in self.subjects)


class Generator:
    """Computes the rows of a `Work`, pictures of the same references together."""

    def __init__(self, params: GenerateParams, load: Callable[[str], Painter], side: int, roots: Roots) -> None:
        """`load` gives a method's painter, of pictures `side` px wide; one is held at a time."""
        self.params, self.load, self.side, self.roots = params, load, side, roots
        self.held: tuple[str, Painter] | None = None

    def __call__(self, work: Work) -> list[dict[str, Any]]:
        names = [subject.class_name for subject in work.subjects]
        rows: list[dict[str, Any]] = []
        for _, members in groupby(sorted(work.pictures, key=by_references), key=by_references):
            queue = list(members)
            segments = [protocol.read_segment(self.roots, job.reference, self.params.margin) for job in queue[0]]
            for start in range(0, len(queue), self.params.batch_size):
                batch = queue[start : start + self.params.batch_size]
                prompts, seeds = [jobs[0].prompt for jobs in batch], [jobs[0].seed for jobs in batch]
                images = self.painter(work.method)(segments, names, prompts, seeds)
                self.check(work.method, images, len(batch))
                for jobs, image in zip(batch, images, strict=True):
                    rows += rows_of(work, jobs, image)
        return rows

    def painter(self, method: str) -> Painter:
        """Return the method's painter, in the place of the one before."""
        if self.held is not None and self.held[0] != method:
            self.held = None
            gc.collect()  # a pipeline is full of cycles, and two would not fit a GPU that one fills
        if self.held is None:
            self.held = method, self.load(method)
        return self.held[1]

    def check(self, method: str, images: Sequence[Image.Image], count: int) -> None:
        """Raise UserError where a method did not draw what it was asked for."""
        odd = next((image.size for image in images if image.size != (self.side, self.side)), None)
        if len(images) != count:
            raise UserError(f"method {method} drew {len(images)} pictures for {count} prompts; return one for each")
        if odd is not None:
            raise UserError(
                f"method {method} drew a picture of {odd[0]}x{odd[1]} px; the protocol's are {self.side}x{self.side}"
            )


def load_generator(inputs: MethodInputs, sources: Sequence[SourceParams]) -> Generator:
    """Return the generator of the methods of `eval.methods` on a device."""
    torch.set_num_threads(inputs.params.threads)
    side = inputs.variant.resolution
    return Generator(inputs.params, lambda name: find_method(name)(inputs), side, Roots(sources))


def by_references(jobs: Picture) -> list[str]:
    """Return what pictures are drawn together by."""
    return [job.reference.frame_id for job in jobs]


def rows_of(work: Work, jobs: Picture, picture: Image.Image) -> Iterator[dict[str, Any]]:
    """Yield the rows of the generations table of a picture, one for each subject in it."""
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "PNG")
    for subject, job in zip(work.subjects, jobs, strict=True):
        others = [other.subject_id for other in work.subjects if other is not subject]
        yield {
            "method": work.method,
            "subject_id": subject.subject_id,
            "class_name": subject.class_name,
            "partner": others[0] if others else None,
            "prompt_id": job.prompt_id,
            "group": job.group,
            "prompt": job.prompt,
            "index": job.index,
            "seed": job.seed,
            "reference": job.reference.frame_id,
            "image": stream.getvalue(),
        }


@dataclass(frozen=True)
class Plan:
    """What the protocol asks of every method; of subjects and pairs, those with a usable reference."""

    subjects: Sequence[protocol.Subject]
    """All that are held out."""
    singles: Sequence[tuple[protocol.Subject, Sequence[protocol.Job]]]
    pairs: Sequence[tuple[protocol.Pair, Sequence[Picture]]]

    @property
    def bare(self) -> list[str]:
        """Ids of the subjects without a usable reference."""
        shown = {subject.subject_id for subject, _ in self.singles}
        return [subject.subject_id for subject in self.subjects if subject.subject_id not in shown]

    def work(self, method: str, several: bool) -> Iterator[Work]:
        """Yield what a method has to make, pairs where it can draw `several` subjects."""
        for subject, jobs in self.singles:
            yield Work(method, (subject,), [(job,) for job in jobs])
        for pair, pictures in self.pairs if several else ():
            yield Work(method, pair, pictures)

    def id(self, rule: str, side: int) -> str:
        """Return `protocol.protocol_id` of it."""
        alone = [job for _, jobs in self.singles for job in jobs]
        together = [job for _, pictures in self.pairs for jobs in pictures for job in jobs]
        return protocol.protocol_id(self.subjects, [*alone, *together], rule, side)


def plan_of(data: Path, params: protocol.ProtocolParams) -> Plan:
    """Return the plan for the tables of curate and mask in `data`.

    Raises:
        UserError: no held-out subject has a usable mask, or the fixed list of references names another subject.
    """
    prompts, subjects = protocol.prompts_by_subject(data), protocol.held_out(data)
    strange = params.references.keys() - {subject.subject_id for subject in subjects}
    if strange:
        raise UserError(
            f"generate.protocol.references names '{min(strange)}', which is no held-out subject; "
            f"they are {', '.join(subject.subject_id for subject in subjects[:40])}"
        )
    asked = [
        (subject, protocol.jobs(subject, prompts.get(subject.subject_id, []), params))
        for subject in subjects
        if protocol.references(subject, params)
    ]
    if not asked:
        raise UserError(
            f"none of the {len(subjects)} held-out subjects has a usable mask; see the masks table in {data / 'mask'}"
        )
    chosen = protocol.pairs(subjects, params)
    return Plan(subjects, asked, list(zip(chosen, protocol.pair_jobs(chosen, params), strict=True)))


def tasks(works: Sequence[Work], named: dict[str, Any]) -> Iterator[Task]:
    """Yield the task of each work; `named`: by method, what names its weights and code."""
    for work in works:
        asked = [
            [[job.prompt_id, job.group, job.prompt, job.index, job.seed, job.reference.fingerprint] for job in jobs]
            for jobs in work.pictures
        ]
        inputs = [named[work.method], [subject.class_name for subject in work.subjects], asked]
        yield Task(f"{work.method}/{work.name}", inputs, len(work.pictures), work)


def devices(kind: str, processes: int) -> list[str]:
    """Return the device of each process: the CPU for all, or GPUs, as many as the machine has at most."""
    if kind == "cpu":
        return ["cpu"] * processes
    return [f"cuda:{index}" for index in range(min(processes, torch.cuda.device_count()))] or [kind]


def main() -> None:
    parser = argparse.ArgumentParser(parents=[option_parser()], allow_abbrev=False, description=__doc__)
    parser.add_argument("--adapter", metavar="DIR", help="the adapter to draw with (default: <data>/train/adapter)")
    adapter = parser.parse_args().adapter
    params, run = load("generate", GenerateParams), load("run", RunParams)
    variant, sources = load_variant(load("backbones", BackbonesParams).variant), load("sources", list[SourceParams])
    data, out = data_dir(), data_dir() / "generate"
    folder = Path(adapter) if adapter else data / "train" / "adapter"
    inputs = MethodInputs(params, variant, folder, run.torch_device())
    methods = {name: find_method(name) for name in params.methods}
    weights = {name: method.weights(inputs) for name, method in methods.items()}
    plan = plan_of(data, params.protocol)
    works = [work for name, method in methods.items() for work in plan.work(name, method.pairs)]
    tally = run_tasks(
        "generate",
        "generations",
        tasks(works, {name: [weights[name], digest_files(method.code())] for name, method in methods.items()}),
        sum(len(work.pictures) for work in works),
        identity=[params.model_dump(exclude=NOT_OF_A_PICTURE), variant.resolution, digest_files(*CODE)],
        start=[
            partial(load_generator, replace(inputs, device=device), sources)
            for device in devices(inputs.device, params.processes)
        ],
        out=out,
        run=run,
    )
    settings = {
        "id": plan.id(params.protocol.reference, variant.resolution),
        "reference": params.protocol.reference,
        "variant": variant.name,
        "resolution": variant.resolution,
        "methods": weights,
        "weights": {role: named for of_method in weights.values() for role, named in of_method.items()},
    }
    how = params.model_dump(exclude={"methods", "threads", "batch_size", "processes"})
    write_json(out / "protocol.json", {**settings, **how})
    report(out, plan, works, tally)


def report(out: Path, plan: Plan, works: Sequence[Work], tally: Tally) -> None:
    """Write metrics.json, by method what was made, and print it."""
    made: dict[str, dict[str, int]] = {}
    for work in works:
        groups = made.setdefault(work.method, {})
        for picture in work.pictures:
            groups[picture[0].group] = groups.get(picture[0].group, 0) + 1
    by_method = {name: {"pictures": sum(groups.values()), "groups": groups} for name, groups in made.items()}
    counts = {"subjects": len(plan.singles), "subjects_without_mask": len(plan.bare), "pairs": len(plan.pairs)}
    write_json(out / "metrics.json", {**counts, "pictures": tally.pictures, "methods": by_method})
    rate = f", {tally.computed / tally.seconds:.2f} a second" if tally.computed else ""
    print(
        f"generate: {tally.pictures} pictures of {len(plan.singles)} subjects; {tally.done_before} of {tally.subjects} "
        f"tasks done before; {tally.seconds:.1f} s{rate}"
    )
    if plan.bare:
        print(f"  left out, no photo with a usable mask: {', '.join(plan.bare)}")
    names = sorted({group for groups in made.values() for group in groups})
    lines = [(method, *(groups.get(name) for name in names)) for method, groups in made.items()]
    print(outputs.text_table(("pictures", *names), lines))


if __name__ == "__main__":
    cli(main)
