"""Stage: a few of the generated images, sampled again -> the subject's location in each step's attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from eval.generate.methods import MethodInputs, guidance_of, trained_weights, uses_masks
from eval.generate.params import GenerateParams
from eval.probes.location import STAGE
from eval.protocol import protocol
from eval.score import metrics
from eval.tasks.resume import Task, run_tasks
from model.adapter import Adapter, read_description
from model.backbones.diffusion import load_diffusion
from model.backbones.features.source import adapter_source
from model.backbones.variant import Variant, load_variant
from model.methods.guidance import RealCustomGuidance
from model.pipeline.maps import equal_steps, maps_over_steps
from model.pipeline.pipeline import build_pipeline
from pipelines import tables
from pipelines.photos.roots import Roots, SourceParams
from runtime.errors import UserError
from runtime.files import write_metrics
from runtime.params import Params, Section

PLACE = ("subject_id", "group", "prompt_id", "index")
"""Key of an image of the model."""
DRAWN_WITH = ("steps", "guidance_scale", "strength", "location_masks", "margin", "dtype", "realcustom")
"""Settings of the generate stage that an image depends on."""
Drawn = tuple[str, dict[str, Any], protocol.HeldOutPhoto]
"""Class noun, row of the generations table without its image, reference."""


class LocationParams(Section):
    """How many maps are kept."""

    pictures: int = Field(ge=0)  # images sampled again
    steps: int = Field(ge=1)  # evenly spaced from the first to the last step with a map


def chosen(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return `count` rows of the generations table, not cherry-picked: evenly spaced subjects, groups in turn, first
    images."""
    leave_out = (protocol.RECONSTRUCTION, protocol.PAIR)
    first = [row for row in rows if row["index"] == 0 and row["group"] not in leave_out]
    subjects = list(dict.fromkeys(row["subject_id"] for row in first))
    groups = sorted({row["group"] for row in first})
    count = min(count, len(subjects))
    result = []
    for number in range(count):
        own = [row for row in first if row["subject_id"] == subjects[number * len(subjects) // count]]
        wanted = groups[number % len(groups)]
        result.append(next((row for row in own if row["group"] == wanted), own[0]))
    return result


def tasks(rows: Sequence[dict[str, Any]], subjects: Sequence[protocol.HeldOutSubject]) -> Iterator[Task]:
    """Yield the task of each subject.

    Raises:
        UserError: an image was generated from a photo that no longer has a usable mask.
    """
    photos = {photo.frame_id: photo for subject in subjects for photo in subject.photos if photo.quality == "ok"}
    ordered = sorted(rows, key=lambda row: tables.path_order(row["subject_id"]))
    for subject_id, group in groupby(ordered, key=lambda row: row["subject_id"]):
        members = list(group)
        missing = {row["reference"] for row in members} - set(photos)
        if missing:
            raise UserError(
                f"generations were made from '{min(missing)}', which has no usable mask; run generate again"
            )
        work = [(row["class_name"], row, photos[row["reference"]]) for row in members]
        inputs = [
            [*(row[name] for name in PLACE), row["prompt"], row["seed"], photo.fingerprint] for _, row, photo in work
        ]
        yield Task(subject_id, inputs, len(members), work)


class LocationRecorder:
    """Computes the rows of one subject's images."""

    def __init__(
        self,
        params: LocationParams,
        made_by: GenerateParams,
        pipeline: Any,
        side: int,
        roots: Roots,
        guidance: RealCustomGuidance | None = None,
    ) -> None:
        self.params, self.made_by, self.pipeline, self.side, self.roots = params, made_by, pipeline, side, roots
        self.guidance = guidance

    def __call__(self, work: Sequence[Drawn]) -> list[dict[str, Any]]:
        rows = []
        for class_name, row, photo in work:
            segment = protocol.read_segment(self.roots, photo, self.made_by.margin)
            maps = maps_over_steps(partial(self.draw, segment, class_name, row["prompt"], row["seed"]))
            for step in equal_steps(sorted(maps), self.params.steps):
                timestep, values = maps[step]
                rows.append(
                    {
                        **{name: row[name] for name in PLACE},
                        "step": step,
                        "timestep": timestep,
                        "height": values.shape[0],
                        "width": values.shape[1],
                        "map": np.rint(values * 255).astype(np.uint8).tobytes(),
                    }
                )
        return rows

    def draw(self, segment: Image.Image, class_name: str, prompt: str, seed: int, **callbacks: Any) -> Any:
        """Sample one image as the generate stage did."""
        return self.pipeline(
            [prompt],
            segment,
            class_name,
            height=self.side,
            width=self.side,
            num_inference_steps=self.made_by.steps,
            guidance_scale=self.made_by.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(seed)],
            subject_strength=self.made_by.strength,
            location_masks=True,
            guidance=self.guidance,
            output_type="latent",
            **callbacks,
        )


def load_recorder(
    params: LocationParams,
    made_by: GenerateParams,
    variant: Variant,
    adapter: Path,
    sources: Sequence[SourceParams],
    device: str,
) -> LocationRecorder:
    """Return the recorder with the pipeline of the base model and the trained adapter."""
    torch.set_num_threads(made_by.threads)
    diffusion = load_diffusion(variant.diffusion, getattr(torch, made_by.dtype), device)
    trained = Adapter.load(adapter, diffusion.name, diffusion.revision).to(device).eval()
    source = adapter_source(variant, trained.config.encoder, trained.config.feature_layers)
    encoder = source.load(device, batch_size=1)
    pipeline = build_pipeline(diffusion, trained, encoder)
    pipeline.set_progress_bar_config(disable=True)
    guidance = guidance_of(trained, made_by)
    return LocationRecorder(params, made_by, pipeline, variant.resolution, Roots(sources), guidance)


def check_drawn_with(recorded: Mapping[str, Any], weights: Mapping[str, str], made_by: GenerateParams) -> None:
    """Raise UserError if the images were generated with other weights or settings, which would give other maps.

    recorded: protocol.json of `eval.generate`. weights: ids of the model's current weights, by role.
    """
    made = recorded.get("methods", {}).get(metrics.MODEL, {})
    differs = [role for role, name in weights.items() if made.get(role) != name]
    now = made_by.model_dump()
    differs += [f"generate.{name}" for name in DRAWN_WITH if name in recorded and recorded[name] != now[name]]
    if differs:
        raise UserError(
            f"the generations were made with another {' and '.join(differs)} than would be used now; run generate "
            f"again, or pass their adapter with --adapter"
        )


def main(params: Params, adapter: str | None = None) -> None:
    """Run the stage. `adapter`: folder of the adapter that generated the images (default: `<data>/train/adapter`)."""
    location, run = params.section("location", LocationParams), params.run
    made_by = params.section("generate", GenerateParams)
    variant, sources = load_variant(params.variant), params.section("sources", list[SourceParams])
    data, out = params.data, params.data / STAGE.name
    folder = Path(adapter) if adapter else data / "train" / "adapter"
    weights = trained_weights(MethodInputs(made_by, variant, folder, run.torch_device()))
    columns = [name for name in tables.spec("generations").columns if name != "image"]
    made = tables.read(data / "generate", "generations", columns).to_pylist()
    own = [row for row in made if row["method"] == metrics.MODEL]
    masks = uses_masks(read_description(folder)[0], made_by)
    rows = chosen(own, location.pictures if masks else 0)  # no maps without location masks
    if rows:
        check_drawn_with(protocol.read_protocol(data / "generate" / "protocol.json"), weights, made_by)
    tally = run_tasks(
        STAGE.name,
        "location_masks",
        tasks(rows, protocol.held_out(data)),
        len(rows),
        identity=[location.steps, made_by.model_dump(), STAGE.code(), weights],
        start=partial(load_recorder, location, made_by, variant, folder, sources, run.torch_device()),
        out=out,
        run=run,
    )
    maps = tables.count(out, "location_masks")
    write_metrics(out, {"pictures": tally.pictures, "maps": maps}, {"images": tally.pictures})
    print(f"location: {maps} maps of {tally.pictures} images; {tally.seconds:.1f} s")
