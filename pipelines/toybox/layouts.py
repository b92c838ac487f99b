"""The embedded world in the raw layouts of MVImgNet, Open Images and DreamBench.

Each writer renders a list of items in batches and writes files under one folder; besides the real layout's files there
is `captions.csv` (path, caption), an optional sidecar that readers use if present.
"""

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.toybox import colmap
from pipelines.toybox.prompts import Answer, prompt
from pipelines.toybox.rendering.march import camera
from pipelines.toybox.world import (
    ACCESSORIES,
    FAMILIES,
    SCENES,
    SHAPES,
    STYLES,
    Detail,
    Item,
    Toy,
    caption,
    render,
    sample_look,
    sample_subject,
    sample_view,
)

BATCH = 240
"""Images held in memory at once."""

Progress = Callable[[int, int], None]
"""Called with (images done, images in total) after every batch."""

MVIMGNET, OPENIMAGES, DREAMBENCH = 1, 2, 3


def generator(seed: int, layout: int, index: int) -> np.random.Generator:
    """The random stream of one subject: it depends only on seed, layout and index, so that worlds of different sizes
    share their subjects."""
    return np.random.default_rng([seed, layout, index])


def name_of(seed: int, layout: int, index: int, digits: int) -> str:
    """A stable hexadecimal name."""
    return hashlib.sha256(f"toybox/{seed}/{layout}/{index}".encode()).hexdigest()[:digits]


def _save_jpeg(path: Path, rgb: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(path, quality=95, subsampling=0)


def _save_mask(path: Path, mask: NDArray[np.bool_]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def _save_table(path: Path, header: str, rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(header + "\n")
        csv.writer(file, lineterminator="\n").writerows(rows)


Picture = tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.float32]]


def _rendered(groups: Sequence[Sequence[Item]], size: int, progress: Progress) -> Iterator[tuple[int, list[Picture]]]:
    """Render groups of items, whole groups at a time; yields (group number, its images)."""
    total, done, start = sum(map(len, groups)), 0, 0
    while start < len(groups):
        end, count = start, 0
        while end < len(groups) and (end == start or count + len(groups[end]) <= BATCH):
            count += len(groups[end])
            end += 1
        out = render([item for group in groups[start:end] for item in group], size)
        arrays = [x.numpy() for x in (out.images, out.masks, out.depth)]
        at = 0
        for number in range(start, end):
            n = len(groups[number])
            yield (
                number,
                [(arrays[0][i], arrays[1][i], arrays[2][i]) for i in range(at, at + n)],
            )
            at += n
        start, done = end, done + count
        progress(done, total)


def capture(rng: np.random.Generator, views: int, scene_per_view: bool, subject: Toy) -> list[Item]:
    """A capture of one subject: jittered azimuths all around it, a different elevation in every view."""
    first, look = float(rng.uniform(0, 360)), sample_look(rng)
    heights = rng.permutation(np.linspace(9, 41, views))
    items: list[Item] = []
    for k in range(views):
        azimuth = first + 360 / views * (k + float(rng.uniform(-0.35, 0.35)))
        view = sample_view(rng, (azimuth + 180) % 360 - 180)
        view = replace(view, elevation=round(float(heights[k]), 4))
        items.append((subject, view, sample_look(rng) if scene_per_view else look))
    return items


def write_mvimgnet(
    root: Path,
    seed: int,
    subjects: int,
    views: int,
    scene_per_view: bool,
    size: int,
    detail: Detail,
    progress: Progress,
) -> None:
    """`<class id>/<video id>/{images,masks,sparse/0}` and mvimgnet_category.txt; no held-out subjects."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "mvimgnet_category.txt").write_bytes("".join(f"{i},{f}\r\n" for i, f in enumerate(FAMILIES)).encode())
    streams = [generator(seed, MVIMGNET, i) for i in range(subjects)]
    people = [sample_subject(rng, FAMILIES[i % len(FAMILIES)], kept=False) for i, rng in enumerate(streams)]
    groups = [capture(rng, views, scene_per_view, who) for rng, who in zip(streams, people, strict=True)]
    captions: list[tuple[str, str]] = []
    for i, rendered in _rendered(groups, size, progress):
        folder = f"{FAMILIES.index(people[i].family)}/{name_of(seed, MVIMGNET, i, 8)}"
        shots = []
        for k, ((rgb, mask, depth), (who, view, look)) in enumerate(zip(rendered, groups[i], strict=True)):
            _save_jpeg(root / folder / f"images/{k:03d}.jpg", rgb)
            _save_mask(root / folder / f"masks/{k:03d}.png", mask)
            rotation, translation, _ = camera(view, size)
            shots.append(colmap.Shot(f"{k:03d}.jpg", rotation, translation, rgb, depth))
            captions.append(
                (
                    f"{folder}/images/{k:03d}.jpg",
                    caption(who, look, detail=detail, rng=streams[i]),
                )
            )
        colmap.write_model(
            root / folder / "sparse/0",
            shots,
            camera(groups[i][0][1], size)[2],
            streams[i],
        )
    _save_table(root / "captions.csv", "path,caption", sorted(captions))


BOX_HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside,"
    "XClick1X,XClick2X,XClick3X,XClick4X,XClick1Y,XClick2Y,XClick3Y,XClick4Y"
)
MASK_HEADER = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
IMAGE_HEADER = (
    "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,OriginalMD5,"
    "Thumbnail300KURL,Rotation"
)


def _mid(family: str) -> str:
    return f"/m/0toy{FAMILIES.index(family):02d}"


def _extremes(mask: NDArray[np.bool_]) -> tuple[list[str], list[str]]:
    """Box (XMin, XMax, YMin, YMax) and extreme clicks (left, top, right, bottom: four x, then four y), as fractions."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    box = (
        columns.min() / width,
        (columns.max() + 1) / width,
        rows.min() / height,
        (rows.max() + 1) / height,
    )
    picks = [columns.argmin(), rows.argmin(), columns.argmax(), rows.argmax()]
    clicks = [(columns[i] + 0.5) / width for i in picks] + [(rows[i] + 0.5) / height for i in picks]
    return [f"{v:.6f}" for v in box], [f"{v:.6f}" for v in clicks]


def write_openimages(root: Path, seed: int, photos: int, size: int, detail: Detail, progress: Progress) -> None:
    """The train split's photos, boxes and masks, each photo of a different subject; no held-out subjects."""
    streams = [generator(seed, OPENIMAGES, i) for i in range(photos)]
    items: list[Item] = []
    for rng in streams:
        items.append((sample_subject(rng, kept=False), sample_view(rng), sample_look(rng)))
    boxes, masks, images, captions = [], [], [], []
    for i, [(rgb, mask, _)] in _rendered([[item] for item in items], size, progress):
        image, box_id = (
            name_of(seed, OPENIMAGES, i, 16),
            name_of(seed, OPENIMAGES, i, 24)[16:],
        )
        label = _mid(items[i][0].family)
        box, clicks = _extremes(mask)
        mask_path = f"{image}_{label[1:].replace('/', '')}_{box_id}.png"
        _save_jpeg(root / "train" / f"{image}.jpg", rgb)
        _save_mask(root / "train-masks" / mask_path, mask)
        boxes.append([image, "xclick", label, "1", *box, *"00000", *clicks])
        masks.append([mask_path, image, label, box_id, *box, "", ""])
        images.append([image, "train", *[""] * 9, "0.0"])
        captions.append(
            (
                f"train/{image}.jpg",
                caption(items[i][0], items[i][2], detail=detail, rng=streams[i]),
            )
        )
    names = [(_mid(family), family.capitalize()) for family in FAMILIES]
    _save_table(
        root / "oidv7-class-descriptions-boxable.csv",
        "LabelName,DisplayName",
        names,
    )
    _save_table(root / "oidv6-train-annotations-bbox.csv", BOX_HEADER, sorted(boxes))
    _save_table(root / "train-annotations-object-segmentation.csv", MASK_HEADER, sorted(masks))
    _save_table(root / "train-images-boxable-with-rotation.csv", IMAGE_HEADER, sorted(images))
    _save_table(root / "captions.csv", "path,caption", sorted(captions))


def prompts(live: bool) -> list[str]:
    """25 evaluation prompts; {0} is the unique token, {1} the class noun. Live subjects have more accessory and shape
    prompts, objects more scene prompts."""
    places, worn, shapes = (10, 4, 5) if live else (12, 3, 4)
    answers = (
        *(Answer(scene=scene) for scene in SCENES[:places]),
        *(Answer(style=style) for style in STYLES[1:]),
        *(Answer(accessory=accessory) for accessory in ACCESSORIES[:worn]),
        *(Answer(shape=shape) for shape in SHAPES[:shapes]),
    )
    return [prompt(answer, "{0} {1}") for answer in answers]


def _prompt_block(title: str, live: bool) -> str:
    lines = ",\n".join(f"'{text}'.format(unique_token, class_token)" for text in prompts(live))
    return f"{title}\n\nprompt_list = [\n{lines}\n]\n"


def _held_out(seed: int, subjects: int, photos: int) -> dict[str, tuple[np.random.Generator, list[Item]]]:
    """Name of each evaluation subject -> its random stream after its photos, and its photos in order."""
    objects = [family for family in FAMILIES if family != "duck"]
    order = ["duck", *generator(seed, DREAMBENCH, 0).permutation(objects).tolist()]
    found: dict[str, tuple[np.random.Generator, list[Item]]] = {}
    for index in range(subjects):
        family, turn = order[index % len(order)], index // len(order)
        rng = generator(seed, DREAMBENCH, index + 1)
        subject = sample_subject(rng, family, kept=True)
        found[f"{family}{turn + 1}" if turn else family] = rng, capture(rng, photos, True, subject)
    return found


def people(seed: int, subjects: int, photos: int) -> dict[str, list[Item]]:
    """Name of each evaluation subject of `write_dreambench` -> its photos in order."""
    return {name: items for name, (_, items) in _held_out(seed, subjects, photos).items()}


def write_dreambench(
    root: Path,
    seed: int,
    subjects: int,
    photos: int,
    size: int,
    detail: Detail,
    progress: Progress,
) -> None:
    """`dataset/<subject>/NN.jpg` and prompts_and_classes.txt, of held-out subjects only."""
    members = _held_out(seed, subjects, photos)
    names, groups = list(members), [items for _, items in members.values()]
    captions: list[tuple[str, str]] = []
    for i, rendered in _rendered(groups, size, progress):
        for k, ((rgb, _, _), (who, _, look)) in enumerate(zip(rendered, groups[i], strict=True)):
            path = f"dataset/{names[i]}/{k:02d}.jpg"
            _save_jpeg(root / path, rgb)
            captions.append((path, caption(who, look, detail=detail, rng=members[names[i]][0])))
    classes = "".join(
        f"{name},{family}\n"
        for name, family in sorted((name, items[0][0].family) for name, (_, items) in members.items())
    )
    text = f"Classes\n\nsubject_name,class\n{classes}\nPrompts\n\n"
    text += _prompt_block("Object Prompts", False) + "\n" + _prompt_block("Live Subject Prompts", True)
    (root / "dataset").mkdir(parents=True, exist_ok=True)
    (root / "dataset/prompts_and_classes.txt").write_text(text, encoding="utf-8")
    _save_table(root / "captions.csv", "path,caption", sorted(captions))
