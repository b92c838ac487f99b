"""Stage: the embedded world on disk, in the raw layouts of the real sets (`customcontrast toybox`).

Reads params.yaml, section toybox. Writes <root>/mvimgnet, <root>/openimages and <root>/dreambench of the world of toys,
<root>/portraits, <root>/ffhq, <root>/dreambench and <root>/names.csv of the world of faces, and <root>/world.json.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator
from tqdm import tqdm

from pipelines.toybox import layouts
from pipelines.toybox.faces import layouts as face_layouts
from pipelines.toybox.faces.layouts import Member
from pipelines.toybox.faces.people import CELEBRITIES
from pipelines.toybox.faces.people import Detail as FaceDetail
from pipelines.toybox.world import Detail
from pipelines.toybox.writing import Progress
from runtime.errors import UserError
from runtime.params import Params, Section

MARKER = "world.json"


class FacesParams(Section):
    """People of the world of faces; see `pipelines.toybox.faces.layouts` for their kinds."""

    portraits_named: int = Field(ge=0, le=CELEBRITIES)
    """Celebrities with many views."""
    portraits_unnamed: int = Field(ge=1)
    """Other people with many views."""
    portraits_views: int = Field(ge=2, le=100)
    """Views of each of them."""
    ffhq_photos: int = Field(ge=1)
    """Single photos, each of another unnamed person, those of the portraits among them."""
    dreambench_named: int = Field(ge=0, le=CELEBRITIES)
    """Celebrities for evaluation, those of the portraits among them, in other photos."""
    dreambench_unnamed: int = Field(ge=0)
    """Unnamed people for evaluation, likewise."""
    dreambench_held_out: int = Field(ge=1)
    """Held-out people for evaluation."""
    dreambench_photos: int = Field(ge=1, le=100)
    """Photos of each of them."""

    def evaluated(self) -> list[Member]:
        """The people for evaluation."""
        return face_layouts.members(self.dreambench_named, self.dreambench_unnamed, self.dreambench_held_out)


class ToyboxParams(Section):
    """Contents of the embedded world."""

    root: str
    """Folder of the world."""
    world: Literal["toys", "faces"]
    """Who is in it."""
    seed: int = Field(ge=0)
    """Same seed, same bytes."""
    size: int = Field(ge=16, le=1024)
    """Side of every image in pixels."""
    mvimgnet_subjects: int = Field(ge=1)
    """Subjects with many views; the families alternate."""
    mvimgnet_views: int = Field(ge=2)
    """Views of each of them."""
    scene_per_view: bool
    """A different background in every view. With one background per capture, an adapter learns to copy the reference's
    background."""
    openimages_photos: int = Field(ge=1)
    """Single photos, each of a different subject."""
    dreambench_subjects: int = Field(ge=1)
    """Held-out subjects for evaluation; the first is a duck, the only live family."""
    dreambench_photos: int = Field(ge=1, le=100)
    """Photos of each of them."""
    caption_detail: Detail
    """What captions.csv states about the subject: noun, colour or full (colour and pattern; of people hair and beard).
    With noun, the look of the subject can only be learnt from the reference."""
    faces: FacesParams

    @model_validator(mode="after")
    def people_have_no_main_colour(self) -> Self:
        if self.world == "faces" and self.caption_detail == "colour":
            raise ValueError("caption_detail is colour, which people have not; use noun or full")
        return self


def fingerprint(params: ToyboxParams) -> str:
    """Hash of the params (without the root) and of this package's source: identifies the world's content."""
    digest = hashlib.sha256(params.model_dump_json(exclude={"root"}).encode())
    here = Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        digest.update(path.relative_to(here).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def is_complete(root: Path, params: ToyboxParams) -> bool:
    """Whether the folder contains the complete world of these params."""
    marker = root / MARKER
    return marker.is_file() and json.loads(marker.read_text())["fingerprint"] == fingerprint(params)


def world_of(bench: Path) -> ToyboxParams | None:
    """The params of the world that the folder `bench` is the DreamBench layout of; None if it is of no world.

    Raises:
        UserError: this code would render that world otherwise.
    """
    root = bench.parent
    if bench.name != "dreambench" or not (root / MARKER).is_file():
        return None
    try:
        found = ToyboxParams(root=str(root), **json.loads((root / MARKER).read_text())["params"])
    except ValidationError:
        found = None
    if found is None or not is_complete(root, found):
        raise UserError(f"{root} was rendered by other code than this; run the toybox stage again")
    return found


def write_world(
    root: Path,
    params: ToyboxParams,
    progress: Callable[[str, int, int], None] | None = None,
) -> bool:
    """Write the world and return True, or return False if it already exists.

    progress(layout, images done, images in total). The world is written to a sibling folder and renamed when complete,
    so the root never holds a partial one. Raises UserError if the root holds anything but a world.
    """
    if is_complete(root, params):
        return False
    if root.exists() and any(root.iterdir()) and not (root / MARKER).is_file():
        raise UserError(f"{root} holds files but no {MARKER}: not a toybox world; choose another toybox.root")

    def report(layout: str) -> Progress:
        return lambda done, total: progress(layout, done, total) if progress else None

    part, old = (
        root.with_name(root.name + ".partial"),
        root.with_name(root.name + ".old"),
    )
    for folder in (part, old):
        shutil.rmtree(folder, ignore_errors=True)
    {"toys": _write_toys, "faces": _write_faces}[params.world](part, params, report)
    record = {
        "fingerprint": fingerprint(params),
        "params": params.model_dump(exclude={"root"}),
    }
    (part / MARKER).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    os.sync()
    if root.exists():
        root.rename(old)
    part.rename(root)
    shutil.rmtree(old, ignore_errors=True)
    return True


def _write_toys(root: Path, p: ToyboxParams, report: Callable[[str], Progress]) -> None:
    layouts.write_mvimgnet(
        root / "mvimgnet",
        p.seed,
        p.mvimgnet_subjects,
        p.mvimgnet_views,
        p.scene_per_view,
        p.size,
        p.caption_detail,
        report("mvimgnet"),
    )
    layouts.write_openimages(
        root / "openimages", p.seed, p.openimages_photos, p.size, p.caption_detail, report("openimages")
    )
    layouts.write_dreambench(
        root / "dreambench",
        p.seed,
        p.dreambench_subjects,
        p.dreambench_photos,
        p.size,
        p.caption_detail,
        report("dreambench"),
    )


def _write_faces(root: Path, p: ToyboxParams, report: Callable[[str], Progress]) -> None:
    faces = p.faces
    detail: FaceDetail = "full" if p.caption_detail == "full" else "noun"
    face_layouts.write_names(root / "names.csv")
    face_layouts.write_portraits(
        root / "portraits",
        p.seed,
        faces.portraits_named,
        faces.portraits_unnamed,
        faces.portraits_views,
        p.size,
        detail,
        report("portraits"),
    )
    face_layouts.write_ffhq(root / "ffhq", p.seed, faces.ffhq_photos, p.size, detail, report("ffhq"))
    face_layouts.write_bench(
        root / "dreambench",
        p.seed,
        faces.evaluated(),
        faces.dreambench_photos,
        p.size,
        detail,
        report("dreambench"),
    )


def main(params: Params) -> None:
    """Run the stage."""
    toybox = params.section("toybox", ToyboxParams)
    torch.set_num_threads(1)  # the renderer's tensors are small: more threads are only overhead
    with tqdm(unit="image", disable=None) as bar:

        def progress(layout: str, done: int, total: int) -> None:
            bar.set_description(layout, refresh=False)
            bar.total, bar.n = total, done
            bar.refresh()

        fresh = write_world(Path(toybox.root), toybox, progress)
    count = sum(len(file.read_text().splitlines()) - 1 for file in Path(toybox.root).glob("*/captions.csv"))
    print(f"{toybox.root}: {count} images, {'written' if fresh else 'already complete'}")
