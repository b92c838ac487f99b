"""UNO: a JSON list of prompts, each with the paths of a target and of its references."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pipelines.export.formats.base import EncodedPair, Format, line, refuse_masks, write_file
from pipelines.export.options import ExportOptions
from pipelines.export.plan import Part


class Uno(Format):
    """`train.json`, a list of `image_paths` (references), `image_tgt_path` and `prompt`, paths relative to it."""

    name = "uno"
    summary = "a JSON list of prompt, target and references"

    def check(self, options: ExportOptions) -> None:
        refuse_masks("UNO", options)

    def write(self, part: Part, pairs: Iterable[EncodedPair], folder: Path, options: ExportOptions) -> Iterator[str]:
        for pair in pairs:
            paths = {}
            for role, (suffix, data) in pair.files.items():
                paths[role] = f"{part.split}/{part.index:06d}/{pair.key}.{role}{suffix}"
                write_file(folder / paths[role], data)
            target = paths.pop("target")
            images = {"image_paths": list(paths.values()), "image_tgt_path": target}
            yield line(images | {"prompt": pair.captions["target"]} | pair.record)

    def holder(self, split: str, index: int, number: int, options: ExportOptions) -> str:
        return f"{split}/{index:06d}/{number:08d}.target{options.suffix}"

    def index(
        self, split: str, entries: Iterator[str], options: ExportOptions
    ) -> Iterator[tuple[str, Iterable[bytes]]]:
        yield f"{split}.json", _list(entries)

    def reads(self, splits: Iterable[str], options: ExportOptions) -> str:
        return "accelerate launch train.py --train_data_json PATH/train.json    # in the folder of UNO"


def _list(entries: Iterator[str]) -> Iterator[bytes]:
    """Yield a JSON list piece by piece."""
    for place, entry in enumerate(entries):
        yield f"{',' if place else '['}\n{entry}".encode()
    yield b"\n]\n"
