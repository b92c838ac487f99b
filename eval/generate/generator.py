"""Images of a subject, by one method: the rows of the generations table."""

from __future__ import annotations

import gc
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
from PIL import Image

from eval.generate.methods import MethodInputs, Painter, find_method
from eval.generate.params import GenerateParams
from eval.protocol import protocol
from eval.protocol.plan import Plan
from model.images.marks import marked_png
from pipelines.photos.roots import Roots, SourceParams
from runtime.errors import UserError

Picture = tuple[protocol.Job, ...]
"""An image to generate: one job for each of its subjects."""


@dataclass(frozen=True)
class Work:
    """The images that one method generates of a subject or a pair."""

    method: str
    subjects: tuple[protocol.HeldOutSubject, ...]
    pictures: Sequence[Picture]

    @property
    def name(self) -> str:
        """Unique among the work of a method."""
        return "+".join(subject.subject_id for subject in self.subjects)


class Generator:
    """Computes the rows of a `Work`, batching images of the same references."""

    def __init__(
        self,
        params: GenerateParams,
        load: Callable[[str], Painter],
        side: int,
        roots: Roots,
        weights: Callable[[str], Mapping[str, str]],
    ) -> None:
        """`load` returns a method's painter, of images `side` px wide; one is in memory at a time. `weights` returns
        the ids of what it was made with, by role."""
        self.params, self.load, self.side, self.roots, self.weights = params, load, side, roots, weights
        self.held: tuple[str, Painter] | None = None

    def __call__(self, work: Work) -> list[dict[str, Any]]:
        names = [subject.class_name for subject in work.subjects]
        origin = marks_of(work.method, self.weights(work.method))
        how = {"steps": self.params.steps, "guidance_scale": self.params.guidance_scale}
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
                    rows += rows_of(work, jobs, image, origin | how)
        return rows

    def painter(self, method: str) -> Painter:
        """Return the method's painter, replacing the previous one."""
        if self.held is not None and self.held[0] != method:
            self.held = None
            gc.collect()  # a pipeline has reference cycles, and two may not fit on the GPU
        if self.held is None:
            self.held = method, self.load(method)
        return self.held[1]

    def check(self, method: str, images: Sequence[Image.Image], count: int) -> None:
        """Raise UserError if a method did not return the images asked for."""
        odd = next((image.size for image in images if image.size != (self.side, self.side)), None)
        if len(images) != count:
            raise UserError(f"method {method} returned {len(images)} images for {count} prompts; return one for each")
        if odd is not None:
            raise UserError(
                f"method {method} returned an image of {odd[0]}x{odd[1]} px; the protocol's are {self.side}x{self.side}"
            )


def load_generator(inputs: MethodInputs, sources: Sequence[SourceParams]) -> Generator:
    """Return a generator of the methods of `eval.generate.methods` on a device."""
    torch.set_num_threads(inputs.params.threads)
    side = inputs.variant.resolution
    weights = cache(lambda name: find_method(name).weights(inputs.of(name)))
    return Generator(inputs.params, lambda name: find_method(name)(inputs.of(name)), side, Roots(sources), weights)


def by_references(jobs: Picture) -> list[str]:
    """Return the key by which images are batched."""
    return [job.reference.frame_id for job in jobs]


def marks_of(method: str, weights: Mapping[str, str]) -> dict[str, str]:
    """Return what the images of a method say of the models that made them."""
    names = {"diffusion": "base_model"}
    return {"method": method, **{names.get(role, role.replace(" ", "_")): named for role, named in weights.items()}}


def rows_of(work: Work, jobs: Picture, image: Image.Image, origin: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield an image's rows of the generations table, one for each subject in it; `origin`: of its marks."""
    nouns = [subject.class_name for subject in work.subjects]
    settings = {"prompt": jobs[0].prompt, "class_nouns": nouns, "seed": jobs[0].seed, **origin}
    png = marked_png(image, settings)
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
            "image": png,
        }


def works(plan: Plan, method: str, several: bool, only: Container[str] | None = None) -> Iterator[Work]:
    """Yield a method's work; pairs only if it can generate `several` subjects together. `only`: ids of the subjects
    that it can generate; None: all."""
    for subject, jobs in plan.singles:
        if only is None or subject.subject_id in only:
            yield Work(method, (subject,), [(job,) for job in jobs])
    for pair, pictures in plan.pairs if several else ():
        yield Work(method, pair, pictures)
