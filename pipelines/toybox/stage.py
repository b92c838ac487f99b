"""Stage: the embedded world on disk, in the raw layouts of the real sets (`customcontrast toybox`).

Reads params.yaml, section toybox. Writes <root>/mvimgnet, <root>/openimages, <root>/dreambench and <root>/world.json.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import Field
from tqdm import tqdm

from pipelines.toybox import layouts
from pipelines.toybox.world import Detail
from runtime.errors import UserError
from runtime.params import Params, Section

MARKER = "world.json"


class ToyboxParams(Section):
    """Contents of the embedded world."""

    root: str
    """Folder of the world."""
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
    """What captions.csv states about the subject: noun, colour or full (colour and pattern). With noun, the look of the
    subject can only be learnt from the reference."""


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
    found = ToyboxParams(root=str(root), **json.loads((root / MARKER).read_text())["params"])
    if not is_complete(root, found):
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

    def report(layout: str) -> layouts.Progress:
        return lambda done, total: progress(layout, done, total) if progress else None

    part, old = (
        root.with_name(root.name + ".partial"),
        root.with_name(root.name + ".old"),
    )
    for folder in (part, old):
        shutil.rmtree(folder, ignore_errors=True)
    p = params
    layouts.write_mvimgnet(
        part / "mvimgnet",
        p.seed,
        p.mvimgnet_subjects,
        p.mvimgnet_views,
        p.scene_per_view,
        p.size,
        p.caption_detail,
        report("mvimgnet"),
    )
    layouts.write_openimages(
        part / "openimages",
        p.seed,
        p.openimages_photos,
        p.size,
        p.caption_detail,
        report("openimages"),
    )
    layouts.write_dreambench(
        part / "dreambench",
        p.seed,
        p.dreambench_subjects,
        p.dreambench_photos,
        p.size,
        p.caption_detail,
        report("dreambench"),
    )
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
    count = sum(1 for _ in Path(toybox.root).rglob("*.jpg"))
    print(f"{toybox.root}: {count} images, {'written' if fresh else 'already complete'}")
