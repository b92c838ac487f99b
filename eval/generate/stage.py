"""Stage: held-out subjects and prompts -> images, by each evaluated method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eval.generate import STAGE
from eval.generate.generator import Work, load_generator, works
from eval.generate.methods import METHODS, MODEL, MethodInputs, find_method
from eval.generate.params import GenerateParams
from eval.protocol.plan import Plan, plan_of
from eval.tasks.resume import Tally, Task, run_tasks
from model.backbones.variant import load_variant
from pipelines.photos.roots import SourceParams
from runtime.digest import digest_files
from runtime.files import write_json, write_metrics
from runtime.params import Params
from runtime.text import text_table

# These do not change an image; the images of a task are among its inputs.
NOT_OF_A_PICTURE = {"methods", "adapters", "names", "protocol", "processes"}


def tasks(works: Sequence[Work], named: dict[str, Any]) -> Iterator[Task]:
    """Yield the task of each work; `named`: ids of the weights and code of each method."""
    for work in works:
        asked = [
            [[job.prompt_id, job.group, job.prompt, job.index, job.seed, job.reference.fingerprint] for job in jobs]
            for jobs in work.pictures
        ]
        inputs = [named[work.method], [subject.class_name for subject in work.subjects], asked]
        yield Task(f"{work.method}/{work.name}", inputs, len(work.pictures), work)


def devices(kind: str, processes: int) -> list[str]:
    """Return the device of each process: the CPU for all, or one GPU each, at most as many as the machine has."""
    if kind == "cpu":
        return ["cpu"] * processes
    return [f"cuda:{index}" for index in range(min(processes, torch.cuda.device_count()))] or [kind]


def main(params: Params, adapter: str | None = None) -> None:
    """Run the stage. `adapter`: folder of the adapter (default: `<data>/train/adapter`)."""
    generate, run = params.section("generate", GenerateParams), params.run
    variant, sources = load_variant(params.variant), params.section("sources", list[SourceParams])
    out = params.data / STAGE.name
    folder = Path(adapter) if adapter else params.data / "train" / "adapter"
    rivals = params.data / "rivals" / "adapters"
    adapters = {name: rivals / name for name in METHODS if name != MODEL}
    adapters |= {name: Path(place).expanduser() for name, place in generate.adapters.items()}
    inputs = MethodInputs(generate, variant, folder, run.torch_device(), sources, adapters)
    methods = {name: find_method(name) for name in generate.methods}
    weights = {name: method.weights(inputs.of(name)) for name, method in methods.items()}
    plan = plan_of(params.data, generate.protocol)
    asked = [
        work
        for name, method in methods.items()
        for work in works(plan, name, method.pairs, generate.names if method.named else None)
    ]
    tally = run_tasks(
        STAGE.name,
        "generations",
        tasks(asked, {name: [weights[name], digest_files(method.code())] for name, method in methods.items()}),
        sum(len(work.pictures) for work in asked),
        identity=[generate.model_dump(exclude=NOT_OF_A_PICTURE), variant.resolution, STAGE.code()],
        start=[
            partial(load_generator, replace(inputs, device=device), sources)
            for device in devices(inputs.device, generate.processes)
        ],
        out=out,
        run=run,
    )
    settings = {
        "id": plan.id(generate.protocol.reference, variant.resolution),
        "reference": generate.protocol.reference,
        "variant": variant.name,
        "resolution": variant.resolution,
        "methods": weights,
        "weights": {role: named for of_method in weights.values() for role, named in of_method.items()},
    }
    how = generate.model_dump(exclude={"methods", "adapters", "names", "threads", "batch_size", "processes"})
    write_json(out / "protocol.json", {**settings, **how})
    report(out, plan, asked, tally)


def report(out: Path, plan: Plan, works: Sequence[Work], tally: Tally) -> None:
    """Write metrics.json, the counts of each method, and print them."""
    made: dict[str, dict[str, int]] = {}
    for work in works:
        groups = made.setdefault(work.method, {})
        for picture in work.pictures:
            groups[picture[0].group] = groups.get(picture[0].group, 0) + 1
    by_method = {name: {"pictures": sum(groups.values()), "groups": groups} for name, groups in made.items()}
    counts = {"subjects": len(plan.singles), "subjects_without_mask": len(plan.bare), "pairs": len(plan.pairs)}
    values = {**counts, "pictures": tally.pictures, "methods": by_method}
    write_metrics(out, values, {"images": tally.pictures})
    rate = f", {tally.computed / tally.seconds:.2f} images/s" if tally.computed else ""
    print(
        f"generate: {tally.pictures} images of {len(plan.singles)} subjects; {tally.done_before} of {tally.subjects} "
        f"tasks already done; {tally.seconds:.1f} s{rate}"
    )
    if plan.bare:
        print(f"  skipped, no photo with a usable mask: {', '.join(plan.bare)}")
    names = sorted({group for groups in made.values() for group in groups})
    lines = [(method, *(groups.get(name) for name in names)) for method, groups in made.items()]
    print(text_table(("images", *names), lines))
