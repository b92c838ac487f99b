"""Stage: names that the base model knows -> pictures of these people, in the layout that source `generated` reads."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from model.backbones.identity import spec_digest
from model.backbones.variant import Variant, load_variant
from pipelines import tables
from pipelines.engine import driver
from pipelines.selfaugment import STAGE
from pipelines.selfaugment.layout import publish
from pipelines.selfaugment.people import NOT_OF_A_PICTURE, NamedPerson, SelfAugmentParams, item, read_people
from pipelines.selfaugment.verdicts import MEASURES, verdicts
from runtime.params import Params

SCRATCH = ".drawn"
"""Folder of all pictures, until those to keep are known."""


def main(params: Params) -> None:
    """Run the stage; without a file of names it writes empty tables and loads no model."""
    augment, run = params.section("selfaugment", SelfAugmentParams), params.run
    out = params.data / STAGE.name
    people = [] if augment.names is None else read_people(augment.names)
    scratch = out / SCRATCH
    with driver.sole_writer(STAGE.name, run, out):
        scratch.mkdir(parents=True, exist_ok=True)
        summary = driver.run_stage(
            STAGE.name,
            [item(person, augment) for person in people],
            partial(make_worker, augment, params.variant, run.torch_device() if people else "cpu"),
            identity=identity(augment, load_variant(params.variant)) if people else [],
            kept="pictures",
            others=["people"],
            out=scratch,
            run=run,
            shard_items=augment.shard_names,
        )
        rejected = verdicts(tables.read(scratch, "pictures", MEASURES).to_pylist(), augment)
        tables.move_to_rejects(scratch, "pictures", "frame_id", rejected, STAGE.name)
        publish(scratch, out, {person.id: person.split(augment) for person in people})
        for name in ("people", "rejects"):
            tables.write(out, name, tables.read(scratch, name))
        shutil.rmtree(scratch)
        driver.settle(summary, out, "pictures")
        driver.report(STAGE.name, summary, out, counts(people, augment, summary, out), "picture")


def identity(params: SelfAugmentParams, variant: Variant) -> list[Any]:
    """Return what the pictures and their measures depend on: params, code, their side, weights."""
    specs = [spec for spec in (variant.diffusion, variant.detector, variant.clip, variant.face) if spec is not None]
    made = params.model_dump(exclude=set(NOT_OF_A_PICTURE))
    return [made, STAGE.code(), variant.resolution, [spec_digest(spec) for spec in specs]]


def make_worker(params: SelfAugmentParams, variant: str, device: str) -> Any:
    """Return the worker; its module loads torch, which a run without names has no use for."""
    from pipelines.selfaugment.worker import SelfAugmentWorker

    return SelfAugmentWorker(params, variant, device)


def counts(people: list[NamedPerson], params: SelfAugmentParams, summary: driver.Summary, out: Path) -> dict[str, Any]:
    """Return the stage's metrics besides pictures asked for, kept and rejected; those of unknown names are not made."""
    known = tables.read(out, "people", ["person", "known"]).to_pylist()
    names = {row["person"] for row in known if row["known"]}
    return {
        "drawn": summary.input - summary.rejects.get("unknown_name", 0),
        "names": len(people),
        "names_known": len(names),
        "names_held_out": sum(person.id in names and person.split(params) == "test" for person in people),
        "groups": tables.count_by(tables.read(out, "pictures", ["group"])["group"].to_pylist()),
    }
