"""Stage: held-out subjects and prompts -> generated pictures.

`python -m eval.generate`
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from pydantic import Field

from eval import outputs, protocol
from eval.resume import Tally, Task, run_tasks
from model.adapter import DESCRIPTION, WEIGHTS, Adapter
from model.backbones.clip import load_clip
from model.backbones.diffusion import load_diffusion
from model.backbones.variant import Variant, load_variant
from model.pipeline import build_pipeline
from params import BackbonesParams, RunParams, Section, UserError, cli, data_dir, load
from pipelines.storage import Roots, SourceParams
from stage import digest_files, write_json

HERE = Path(__file__).parent
CODE = (HERE / "generate.py", HERE / "protocol.py", HERE.parent / "model")


class GenerateParams(Section):
    """Which pictures are made, and how."""

    protocol: protocol.ProtocolParams
    steps: int = Field(ge=1)  # of the sampler
    guidance_scale: float
    strength: float  # lambda, of the visual branch
    location_masks: bool  # confine the subject to where its attention lay a step before
    margin: float  # white border of the reference's segment, fraction of its longer side
    batch_size: int = Field(ge=1)  # pictures at once
    dtype: Literal["float32", "float16", "bfloat16"]
    threads: int  # CPU threads; the same number gives the same bytes


class Painter(Protocol):
    """Draws pictures of one subject."""

    def __call__(
        self, segment: Image.Image, class_name: str, prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        """Return a picture for each prompt and seed; `segment` is the reference alone on white."""


class Generator:
    """Computes the rows of one subject, pictures of one reference together."""

    def __init__(self, params: GenerateParams, paint: Painter, roots: Roots) -> None:
        self.params, self.paint, self.roots = params, paint, roots

    def __call__(self, work: tuple[protocol.Subject, Sequence[protocol.Job]]) -> list[dict[str, Any]]:
        subject, jobs = work
        rows = []
        for _, members in groupby(sorted(jobs, key=by_reference), key=by_reference):
            queue = list(members)
            segment = protocol.read_segment(self.roots, queue[0].reference, self.params.margin)
            for start in range(0, len(queue), self.params.batch_size):
                batch = queue[start : start + self.params.batch_size]
                prompts, seeds = [job.prompt for job in batch], [job.seed for job in batch]
                pictures = self.paint(segment, subject.class_name, prompts, seeds)
                rows += [row(subject, job, picture) for job, picture in zip(batch, pictures, strict=True)]
        return rows


def load_generator(
    params: GenerateParams, variant: Variant, adapter: Path, sources: Sequence[SourceParams], device: str
) -> Generator:
    """Return the generator around the pipeline of the base model and the trained adapter."""
    torch.set_num_threads(params.threads)
    diffusion = load_diffusion(variant.diffusion, getattr(torch, params.dtype), device)
    trained = Adapter.load(adapter, diffusion.name, diffusion.revision).to(device).eval()
    # One reference at a time, so one picture is the batch.
    pipeline = build_pipeline(diffusion, trained, load_clip(variant.image_encoder, device, batch_size=1))
    pipeline.set_progress_bar_config(disable=True)
    return Generator(params, painter(pipeline, params, variant.resolution), Roots(sources))


def painter(pipeline: Callable[..., Any], params: GenerateParams, resolution: int) -> Painter:
    """Return `pipeline` with the stage's settings, `resolution` px a side.

    Noise is drawn on the CPU, so that a seed means the same picture on every device.
    """

    def paint(segment: Image.Image, class_name: str, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        images: Any = pipeline(
            prompts,
            segment,
            class_name,
            height=resolution,
            width=resolution,
            num_inference_steps=params.steps,
            guidance_scale=params.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            subject_strength=params.strength,
            location_masks=params.location_masks,
        ).images
        return list(images)

    return paint


def by_reference(job: protocol.Job) -> str:
    """Return what pictures are drawn together by."""
    return job.reference.frame_id


def row(subject: protocol.Subject, job: protocol.Job, picture: Image.Image) -> dict[str, Any]:
    """Return a row of the generations table."""
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "PNG")
    return {
        "subject_id": subject.subject_id,
        "class_name": subject.class_name,
        "prompt_id": job.prompt_id,
        "group": job.group,
        "prompt": job.prompt,
        "index": job.index,
        "seed": job.seed,
        "reference": job.reference.frame_id,
        "image": stream.getvalue(),
    }


def tasks(plan: Sequence[tuple[protocol.Subject, list[protocol.Job]]]) -> Iterator[Task]:
    """Yield the task of each subject that has a reference."""
    for subject, jobs in plan:
        if jobs:
            asked = [
                [job.prompt_id, job.group, job.prompt, job.index, job.seed, job.reference.fingerprint] for job in jobs
            ]
            yield Task(subject.subject_id, [subject.class_name, asked], len(jobs), (subject, jobs))


def main() -> None:
    params, run = load("generate", GenerateParams), load("run", RunParams)
    variant, sources = load_variant(load("backbones", BackbonesParams).variant), load("sources", list[SourceParams])
    data, out, adapter = data_dir(), data_dir() / "generate", data_dir() / "train" / "adapter"
    prompts = protocol.prompts_by_subject(data)
    plan = [
        (subject, protocol.jobs(subject, prompts.get(subject.subject_id, []), params.protocol))
        for subject in protocol.held_out(data)
    ]
    bare = [subject.subject_id for subject, jobs in plan if not jobs]
    if len(bare) == len(plan):
        raise UserError(
            f"none of the {len(plan)} held-out subjects has a usable mask; see the masks table in {data / 'mask'}"
        )
    files = [adapter / name for name in (DESCRIPTION, WEIGHTS)]
    if not all(file.is_file() for file in files):
        raise UserError(f"{adapter} holds no adapter ({DESCRIPTION} and {WEIGHTS}); run the train stage first")
    weights = {
        "diffusion": outputs.weights_name(variant.diffusion),
        "image encoder": outputs.weights_name(variant.image_encoder),
        "adapter": f"adapter@{digest_files(*files)[:12]}",
    }
    tally = run_tasks(
        "generate",
        "generations",
        tasks(plan),
        sum(len(jobs) for _, jobs in plan),
        identity=[params.model_dump(), digest_files(*CODE), weights],
        start=partial(load_generator, params, variant, adapter, sources, run.torch_device()),
        out=out,
        run=run,
    )
    settings = {"variant": variant.name, "resolution": variant.resolution, "weights": weights}
    write_json(out / "protocol.json", {**settings, **params.model_dump(exclude={"threads", "batch_size"})})
    report(out, plan, tally, bare)


def report(
    out: Path, plan: Sequence[tuple[protocol.Subject, list[protocol.Job]]], tally: Tally, bare: Sequence[str]
) -> None:
    """Write metrics.json and print what was made."""
    groups: dict[str, int] = {}
    for _, jobs in plan:
        for job in jobs:
            groups[job.group] = groups.get(job.group, 0) + 1
    counts = {"subjects": tally.subjects, "subjects_without_mask": len(bare), "pictures": tally.pictures}
    write_json(out / "metrics.json", {**counts, "groups": groups})
    rate = f", {tally.computed / tally.seconds:.2f} a second" if tally.computed else ""
    print(
        f"generate: {tally.pictures} pictures of {tally.subjects} subjects, {tally.done_before} subjects done before; "
        f"{tally.seconds:.1f} s{rate}"
    )
    if bare:
        print(f"  left out, no photo with a usable mask: {', '.join(bare)}")
    print(outputs.text_table(("group", "pictures"), sorted(groups.items())))


if __name__ == "__main__":
    cli(main)
