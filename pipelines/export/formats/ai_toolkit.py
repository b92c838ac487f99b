"""ai-toolkit: a folder of targets with captions beside them, and folders of control images with the same names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.compat import StringIO

from pipelines.export.formats.base import FOLDERS, EncodedPair, Format, write_parallel
from pipelines.export.options import ExportOptions
from pipelines.export.plan import Part


class AIToolkit(Format):
    """`train/targets/00000000.jpg` and `.txt`, `train/references/00000000.jpg`; dataset.yaml is the entry of a job."""

    name = "ai-toolkit"
    summary = "folders of targets, captions and control images, with a dataset entry"

    def write(self, part: Part, pairs: Iterable[EncodedPair], folder: Path, options: ExportOptions) -> Iterator[str]:
        for pair in pairs:
            write_parallel(pair, folder / part.split, pair.key)  # flat: its loader looks for names in one folder
            yield ""

    def holder(self, split: str, index: int, number: int, options: ExportOptions) -> str:
        return f"{split}/targets/{number:08d}{options.suffix}"

    def settings(self, splits: Iterable[str], options: ExportOptions) -> Iterator[tuple[str, str]]:
        controls = [f"train/{FOLDERS[role]}" for role in options.roles()[1:]]
        entry = {
            "folder_path": "train/targets",
            "control_path": controls[0] if len(controls) == 1 else controls,
            **({"mask_path": "train/masks"} if "mask" in options.fields else {}),
            "caption_ext": "txt",
            "resolution": [options.size],
        }
        stream = StringIO()
        YAML().dump({"datasets": [entry]}, stream)
        yield "dataset.yaml", "# Paths are relative to this folder: prefix them with its own.\n" + stream.getvalue()

    def reads(self, splits: Iterable[str], options: ExportOptions) -> str:
        return "python run.py JOB.yaml    # with the entry of dataset.yaml among its datasets"
