"""What the writers of all layouts share: random streams, names, files, and photos rendered in batches."""

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.toybox.rendering.render import Rendered

BATCH = 240
"""Images held in memory at once."""

Progress = Callable[[int, int], None]
"""Called with (images done, images in total) after every batch."""

T = TypeVar("T")


class RenderedPhoto(NamedTuple):
    """One image of a `Rendered` batch: rgb uint8 [H, W, 3], mask and subject bool [H, W], depth float32 [H, W]."""

    rgb: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    subject: NDArray[np.bool_]
    depth: NDArray[np.float32]


def generator(seed: int, layout: int, index: int) -> np.random.Generator:
    """The random stream of one subject: it depends only on seed, layout and index, so that worlds of different sizes
    share their subjects."""
    return np.random.default_rng([seed, layout, index])


def name_of(seed: int, layout: int, index: int, digits: int) -> str:
    """A stable hexadecimal name."""
    return hashlib.sha256(f"toybox/{seed}/{layout}/{index}".encode()).hexdigest()[:digits]


def save_photo(path: Path, rgb: NDArray[np.uint8]) -> None:
    """Write a photo, a JPEG or PNG by the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(path, quality=95, subsampling=0)  # of a JPEG; PNG ignores them


def save_mask(path: Path, mask: NDArray[np.bool_]) -> None:
    """Write a mask, white on black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def save_table(path: Path, header: str, rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(header + "\n")
        csv.writer(file, lineterminator="\n").writerows(rows)


def save_listing(root: Path, classes: Mapping[str, str], lists: Mapping[str, Sequence[str]]) -> None:
    """Write DreamBench's `dataset/prompts_and_classes.txt`.

    Args:
        classes: class noun of each subject.
        lists: prompts by the title of their block; {0} is the unique token, {1} the class noun. One that ends in
            `  # word` has its group named there.
    """
    text = "Classes\n\nsubject_name,class\n" + "".join(f"{name},{noun}\n" for name, noun in sorted(classes.items()))
    text += "\nPrompts\n\n" + "\n".join(_block(title, prompts) for title, prompts in lists.items())
    (root / "dataset").mkdir(parents=True, exist_ok=True)
    (root / "dataset/prompts_and_classes.txt").write_text(text, encoding="utf-8")


def _block(title: str, prompts: Sequence[str]) -> str:
    lines = []
    for number, prompt in enumerate(prompts, start=1):
        text, mark, group = prompt.partition("  # ")
        comma = "," if number < len(prompts) else ""
        lines.append(f"'{text}'.format(unique_token, class_token){comma}{mark}{group}\n")
    return f"{title}\n\nprompt_list = [\n{''.join(lines)}]\n"


def rendered(
    groups: Sequence[Sequence[T]],
    render: Callable[[Sequence[T], int], Rendered],
    size: int,
    progress: Progress,
) -> Iterator[tuple[int, list[RenderedPhoto]]]:
    """Render groups of items, whole groups at a time; yields (group number, its photos)."""
    total, done, start = sum(map(len, groups)), 0, 0
    while start < len(groups):
        end, count = start, 0
        while end < len(groups) and (end == start or count + len(groups[end]) <= BATCH):
            count += len(groups[end])
            end += 1
        out = render([item for group in groups[start:end] for item in group], size)
        arrays = [x.numpy() for x in (out.images, out.masks, out.subject_masks, out.depth)]
        photos = [RenderedPhoto(*of_one) for of_one in zip(*arrays, strict=True)]
        at = 0
        for number in range(start, end):
            yield number, photos[at : at + len(groups[number])]
            at += len(groups[number])
        start, done = end, done + count
        progress(done, total)
