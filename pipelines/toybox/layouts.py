"""The embedded world in the raw layouts of MVImgNet, Open Images and DreamBench.

Each writer renders a list of items in batches and writes files under one folder; besides the real layout's files there
is `captions.csv` (path, caption), an optional sidecar that readers use if present.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
from pipelines.toybox.writing import (
    Progress,
    generator,
    name_of,
    rendered,
    save_listing,
    save_mask,
    save_photo,
    save_table,
)

MVIMGNET, OPENIMAGES, DREAMBENCH, VIDEOS = 1, 2, 3, 5  # 4: experiments.metric_trial


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
    for i, shown in rendered(groups, render, size, progress):
        folder = f"{FAMILIES.index(people[i].family)}/{name_of(seed, MVIMGNET, i, 8)}"
        shots = []
        for k, (photo, (who, view, look)) in enumerate(zip(shown, groups[i], strict=True)):
            save_photo(root / folder / f"images/{k:03d}.jpg", photo.rgb)
            save_mask(root / folder / f"masks/{k:03d}.png", photo.mask)
            rotation, translation, _ = camera(view, size)
            shots.append(colmap.Shot(f"{k:03d}.jpg", rotation, translation, photo.rgb, photo.depth))
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
    save_table(root / "captions.csv", "path,caption", sorted(captions))


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
    for i, [photo] in rendered([[item] for item in items], render, size, progress):
        image, box_id = (
            name_of(seed, OPENIMAGES, i, 16),
            name_of(seed, OPENIMAGES, i, 24)[16:],
        )
        label = _mid(items[i][0].family)
        box, clicks = _extremes(photo.mask)
        mask_path = f"{image}_{label[1:].replace('/', '')}_{box_id}.png"
        save_photo(root / "train" / f"{image}.jpg", photo.rgb)
        save_mask(root / "train-masks" / mask_path, photo.mask)
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
    save_table(
        root / "oidv7-class-descriptions-boxable.csv",
        "LabelName,DisplayName",
        names,
    )
    save_table(root / "oidv6-train-annotations-bbox.csv", BOX_HEADER, sorted(boxes))
    save_table(root / "train-annotations-object-segmentation.csv", MASK_HEADER, sorted(masks))
    save_table(root / "train-images-boxable-with-rotation.csv", IMAGE_HEADER, sorted(images))
    save_table(root / "captions.csv", "path,caption", sorted(captions))


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
    for i, shown in rendered(groups, render, size, progress):
        for k, (photo, (who, _, look)) in enumerate(zip(shown, groups[i], strict=True)):
            path = f"dataset/{names[i]}/{k:02d}.jpg"
            save_photo(root / path, photo.rgb)
            captions.append((path, caption(who, look, detail=detail, rng=members[names[i]][0])))
    classes = {name: items[0][0].family for name, (_, items) in members.items()}
    save_listing(root, classes, {"Object Prompts": prompts(False), "Live Subject Prompts": prompts(True)})
    save_table(root / "captions.csv", "path,caption", sorted(captions))
