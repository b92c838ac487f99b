"""SimpleTuner: an image dataset with text files, and conditioning datasets whose files have the same names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.export.formats.base import FOLDERS, EncodedPair, Format, write_parallel
from pipelines.export.options import ExportOptions
from pipelines.export.plan import Part
from runtime.errors import UserError

BACKENDS = "multidatabackend.json"


class SimpleTuner(Format):
    """`train/targets/000000/00000000.jpg` and `.txt`, `train/references/000000/00000000.jpg`; multidatabackend.json
    declares them."""

    name = "simpletuner"
    summary = "an image dataset and its conditioning datasets, with multidatabackend.json"

    def check(self, options: ExportOptions) -> None:
        differs = "masks" if "mask" in options.fields and options.encoding != "png" else None
        if options.reference == "alpha" and options.encoding == "jpeg":
            differs = "transparent references"
        if differs:
            raise UserError(
                f"SimpleTuner pairs files of one name and extension, but {differs} are PNG and targets"
                f" {options.encoding}; give --encoding png"
            )

    def write(self, part: Part, pairs: Iterable[EncodedPair], folder: Path, options: ExportOptions) -> Iterator[str]:
        for pair in pairs:
            write_parallel(pair, folder / part.split, f"{part.index:06d}/{pair.key}")
            yield ""

    def holder(self, split: str, index: int, number: int, options: ExportOptions) -> str:
        return f"{split}/targets/{index:06d}/{number:08d}{options.suffix}"

    def settings(self, splits: Iterable[str], options: ExportOptions) -> Iterator[tuple[str, str]]:
        entries = [entry for split in splits for entry in self.backends(split, options)]
        texts = {"id": "text-embeds", "dataset_type": "text_embeds", "default": True, "type": "local"}
        yield BACKENDS, json.dumps([*entries, texts | {"cache_dir": "cache/text"}], indent=2) + "\n"

    def backends(self, split: str, options: ExportOptions) -> Iterator[dict[str, Any]]:
        """Yield the datasets of a split; the first is that of the targets."""
        masks = [("target_mask", "mask")] if "mask" in options.fields else []
        # Loose: a reference is another view, so it is not cropped as the target is.
        paired = {
            f"{split}-{FOLDERS[role]}": kind
            for role, kind in [*((role, "reference_loose") for role in options.roles()[1:]), *masks]
        }
        shared = {"type": "local", "crop": False, "resolution": options.size, "resolution_type": "pixel_area"}
        yield shared | {
            "id": f"{split}-targets",
            "dataset_type": "image" if split == "train" else "eval",
            "instance_data_dir": f"{split}/targets",
            "caption_strategy": "textfile",
            "conditioning_data": list(paired),
            "cache_dir_vae": f"cache/vae/{split}-targets",
        }
        for name, kind in paired.items():
            yield shared | {
                "id": name,
                "dataset_type": "conditioning",
                "conditioning_type": kind,
                "source_dataset_id": f"{split}-targets",
                "instance_data_dir": name.replace("-", "/"),
                "caption_strategy": None,
                "cache_dir_vae": f"cache/vae/{name}",
            }

    def reads(self, splits: Iterable[str], options: ExportOptions) -> str:
        return f"simpletuner train    # in this folder, with data_backend_config={BACKENDS}"
